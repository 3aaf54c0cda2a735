"""An application (argv: port). `/call?url=..` calls another with the trace of the
request, as tracing libraries do; anything else is told what came, and noted."""

import http.server
import json
import sys
import urllib.error
import urllib.parse
import urllib.request

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        split = urllib.parse.urlsplit(self.path)
        print("came", self.path, flush=True)
        if split.path == "/call":
            url = urllib.parse.parse_qs(split.query)["url"][0]
            trace = self.headers.get("traceparent")
            headers = {"traceparent": trace, "Host": "back"} if trace else {"Host": "back"}
            try:
                with OPENER.open(urllib.request.Request(url, headers=headers), timeout=20) as said:
                    return self.answer(said.status, said.read())
            except urllib.error.HTTPError as error:
                return self.answer(error.code, error.read())
        headers = {name.lower(): self.headers.get_all(name) for name in self.headers}
        self.answer(200, json.dumps({"path": self.path, "headers": headers}).encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        print("came", self.path, len(body), flush=True)
        self.answer(200, f"{len(body)} {self.headers.get('authorization')}".encode())

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Handler)
print("listening", flush=True)
server.serve_forever()
