"""gRPC that tells the caller's `authorization` (grpcio). `serve PORT`;
`call ADDRESS HOST METHOD..` prints the code and the answer, or its details, of each
call on one channel."""

import sys
from concurrent import futures

import grpc


class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(self.answer)

    def answer(self, request, context):
        sent = dict(context.invocation_metadata())
        print("came", request, flush=True)
        return sent.get("authorization", "none").encode()


command, at, *rest = sys.argv[1:]
if command == "serve":
    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=(Handler(),))
    server.add_insecure_port(f"0.0.0.0:{at}")
    server.start()
    print("listening", flush=True)
    server.wait_for_termination()

host, *methods = rest
options = (("grpc.enable_http_proxy", 0), ("grpc.default_authority", host))
with grpc.insecure_channel(at, options=options) as channel:
    for method in methods:
        try:
            print("OK", channel.unary_unary(method)(b"hello", timeout=20).decode())
        except grpc.RpcError as error:
            print(error.code().name, error.details())
