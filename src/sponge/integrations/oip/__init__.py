"""The Open Inference Protocol (version 2), over HTTP and gRPC: clients of Triton, KServe and others work unchanged.

`http.inference_app` is an ASGI application, `service.add_inference_service` adds the gRPC service to a server of
``grpcio``'s, blocking or asyncio. Both serve `Scheduler` s by name.
"""
