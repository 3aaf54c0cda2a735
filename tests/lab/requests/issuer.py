"""An issuer of keys, and an external authorizer, on one HTTP port (argv: address,
port, directory): `/keys` serves the directory's keys.json and counts, `/check...`
allows who has `x-ticket: yes`, and names the caller."""

import http.server
import pathlib
import sys

address, port, directory = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/keys":
            print("fetched", flush=True)
            self.answer(200, (directory / "keys.json").read_bytes())
        elif self.path.startswith("/check"):
            print("asked", self.path, self.headers.get("x-ticket"), flush=True)
            if self.headers.get("x-ticket") == "yes":
                self.answer(200, b"", x_holder="checked")
            else:
                self.answer(402, b"no ticket", x_why="none")
        else:
            self.answer(404, b"")

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer((address, port), Handler)
print("listening", flush=True)
server.serve_forever()
