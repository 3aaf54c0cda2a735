"""gRPC without generated code: bytes in, bytes out (grpcio).

`serve PORT`; `call ADDRESS METHOD [TOKEN]` prints the status code and the answer;
`calls ADDRESS METHOD..` prints their codes; `each ADDRESS METHOD COUNT` makes so many
calls, each on a connection of its own; `many ADDRESS METHOD` streams 1000 messages there and back; `slow ADDRESS METHOD COUNT`
streams so many, one each 50 ms; `steady ADDRESS METHOD` calls each 50 ms on a connection that
it keeps, and prints the code of each and what was wrong.
"""

import sys
import time
from concurrent import futures

import grpc


class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        if details.method.endswith("/Stream"):
            return grpc.stream_stream_rpc_method_handler(lambda messages, _: messages)
        return grpc.unary_unary_rpc_method_handler(self.answer)

    def answer(self, request, context):
        context.set_trailing_metadata((("x-trailer", "kept"),))
        if request == b"fail":
            context.abort(grpc.StatusCode.OUT_OF_RANGE, "as asked")
        return b"echo " + request


command, at, *rest = sys.argv[1:]
if command == "serve":
    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=(Handler(),))
    server.add_insecure_port(f"0.0.0.0:{at}")
    server.start()
    print("listening", flush=True)
    server.wait_for_termination()

if command == "calls":
    said = []
    with grpc.insecure_channel(at, options=(("grpc.enable_http_proxy", 0),)) as channel:
        for method in rest:
            call = channel.unary_unary(method).future(b"hello", timeout=20)
            said.append(call.code().name)
    print(*said)
    sys.exit()

if command == "steady":
    with grpc.insecure_channel(at, options=(("grpc.enable_http_proxy", 0),)) as channel:
        while True:
            call = channel.unary_unary(rest[0]).future(b"hello", timeout=20)
            print(call.code().name, call.details() or "", flush=True)
            time.sleep(0.05)

if command == "each":
    method, count = rest
    options = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))
    for _ in range(int(count)):
        with grpc.insecure_channel(at, options=options) as channel:
            channel.unary_unary(method)(b"hello", timeout=20)
    print("OK", count)
    sys.exit()

if command == "slow":
    method, count = rest

    def slowly():
        for number in range(int(count)):
            yield b"word %d" % number
            time.sleep(0.05)

    with grpc.insecure_channel(at, options=(("grpc.enable_http_proxy", 0),)) as channel:
        heard = 0
        try:
            for message in channel.stream_stream(method)(slowly()):
                heard += 1
                print("heard", heard, flush=True)
            print("OK", heard, flush=True)
        except grpc.RpcError as error:
            print("cut", error.code().name, error.details(), flush=True)
    sys.exit()

metadata = (("authorization", f"Bearer {rest[1]}"),) if len(rest) > 1 else ()
with grpc.insecure_channel(at, options=(("grpc.enable_http_proxy", 0),)) as channel:
    try:
        if command == "many":
            sent = [b"x" * 1000 for _ in range(1000)]
            back = list(channel.stream_stream(rest[0])(iter(sent), timeout=20))
            print("OK", len(back), sum(map(len, back)))
        else:
            answer, call = channel.unary_unary(rest[0]).with_call(
                b"hello" if "Fail" not in rest[0] else b"fail", metadata=metadata, timeout=20
            )
            print("OK", answer.decode(), dict(call.trailing_metadata()).get("x-trailer"))
    except grpc.RpcError as error:
        print(error.code().name, error.details())
