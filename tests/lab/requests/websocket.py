"""A WebSocket echo server (`serve PORT`), or a client that says a word each 50 ms
until it is cut off (`talk URL [TOKEN]`)."""

import asyncio
import sys

import websockets


async def echo(socket):
    async for message in socket:
        await socket.send(message)


async def serve(port):
    async with websockets.serve(echo, "0.0.0.0", port):
        print("listening", flush=True)
        await asyncio.Future()


async def talk(url, token=None):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        async with websockets.connect(url, extra_headers=headers, ping_interval=None) as socket:
            for count in range(100000):
                await socket.send(f"word {count}")
                print("heard", await socket.recv(), flush=True)
                await asyncio.sleep(0.05)
    except websockets.exceptions.InvalidStatusCode as error:
        print("refused", error.status_code, flush=True)
    except (websockets.exceptions.ConnectionClosed, OSError) as error:
        print("cut", type(error).__name__, flush=True)


command, *rest = sys.argv[1:]
asyncio.run({"serve": lambda: serve(int(rest[0])), "talk": lambda: talk(*rest)}[command]())
