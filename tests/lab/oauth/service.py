"""A service that knows nothing of tokens. It asks the next one, where there is one, and
forwards the trace header as applications with tracing do; it shows what reached it.

service.py NAME PORT [NEXT]
"""

import http.server
import json
import sys
import urllib.error
import urllib.request

NAME, PORT, NEXT = sys.argv[1], int(sys.argv[2]), (sys.argv[3:] or [None])[0]


class Service(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        said = {"name": NAME, "authorization": "Authorization" in self.headers}
        if NEXT:
            trace = self.headers["traceparent"]
            headers = {"traceparent": trace} if trace else {}
            request = urllib.request.Request(f"http://{NEXT}/orders", headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=20) as answer:
                    said["next"] = json.loads(answer.read())
            except urllib.error.HTTPError as error:
                said["refused"] = [error.code, error.read().decode()]
        body = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


print("listening", flush=True)
http.server.ThreadingHTTPServer(("", PORT), Service).serve_forever()
