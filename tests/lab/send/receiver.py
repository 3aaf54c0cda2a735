"""Receives OTLP logs with the official protobuf classes, and writes each record as a
line of JSON. Arguments: grpc or http, port, directory; a certificate and its key for
TLS. The file `mode` in the directory says how to behave; `attempts` gets a line with
the time of each request."""

import gzip
import http.server
import json
import pathlib
import ssl
import sys
import time
from concurrent import futures

from google.protobuf import any_pb2, duration_pb2, json_format
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as service

protocol, port, directory = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
tls = sys.argv[4:6]


def mode():
    try:
        return (directory / "mode").read_text().strip()
    except FileNotFoundError:
        return "ok"


def taken(request, metadata):
    with open(directory / "attempts", "a") as file:
        print(time.time(), file=file)
    how = mode()
    answer = service.ExportLogsServiceResponse()
    if how == "hang":
        time.sleep(30)
    if how in ("busy", "hang"):
        return None
    logs = [r for one in request.resource_logs for scope in one.scope_logs for r in scope.log_records]
    third = any('"seq":3,' in record.body.string_value for record in logs)
    if how == "wrong" or (how == "picky" and third):
        return "refused"
    if how == "partial":
        answer.partial_success.rejected_log_records = 2
        answer.partial_success.error_message = "too old"
    with open(directory / "records", "a") as file:
        for logs in request.resource_logs:
            resource = json_format.MessageToDict(logs.resource)
            for scope in logs.scope_logs:
                for record in scope.log_records:
                    line = json_format.MessageToDict(record)
                    line["resource"] = resource
                    line["metadata"] = metadata
                    print(json.dumps(line), file=file)
    return answer


def retry_info():
    """google.rpc.Status with a RetryInfo of two seconds, by hand: its classes are in
    another package."""
    delay = duration_pb2.Duration(seconds=2).SerializeToString()
    info = any_pb2.Any(
        type_url="type.googleapis.com/google.rpc.RetryInfo",
        value=bytes([10, len(delay)]) + delay,
    ).SerializeToString()
    return bytes([8, 14]) + bytes([26, len(info)]) + info


def serve_grpc():
    import grpc

    def export(request, context):
        metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        answer = taken(request, metadata)
        if answer is None:
            context.set_trailing_metadata((("grpc-status-details-bin", retry_info()),))
            context.abort(grpc.StatusCode.UNAVAILABLE, "busy")
        if answer == "refused":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not like this")
        return answer

    method = grpc.unary_unary_rpc_method_handler(
        export,
        service.ExportLogsServiceRequest.FromString,
        service.ExportLogsServiceResponse.SerializeToString,
    )
    name = "opentelemetry.proto.collector.logs.v1.LogsService"
    handler = grpc.method_handlers_generic_handler(name, {"Export": method})
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((handler,))
    address = f"127.0.0.1:{port}"
    if tls:
        certificate, key = (pathlib.Path(p).read_bytes() for p in tls)
        server.add_secure_port(address, grpc.ssl_server_credentials(((key, certificate),)))
    else:
        server.add_insecure_port(address)
    server.start()
    print("listening", flush=True)
    server.wait_for_termination()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        right = self.headers["content-type"] == "application/x-protobuf"
        if self.path != "/v1/logs" or not right:
            return self.answer(404, b"")
        request = service.ExportLogsServiceRequest.FromString(body)
        metadata = {key.lower(): value for key, value in self.headers.items()}
        answer = taken(request, metadata)
        if answer is None:
            return self.answer(429, b"", ("retry-after", "2"))
        if answer == "refused":
            return self.answer(400, b"")
        return self.answer(200, answer.SerializeToString())

    def answer(self, status, body, *headers):
        self.send_response(status)
        for name, value in (*headers, ("content-length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def serve_http():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    print("listening", flush=True)
    server.serve_forever()


serve_grpc() if protocol == "grpc" else serve_http()
