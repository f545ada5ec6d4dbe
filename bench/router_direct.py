"""A bare grpc.aio server of the Inference service: answers with messages of the router's size, and nothing behind it.

What a call to it takes is gRPC's own; what a call through the router takes more is the router's.
"""

from __future__ import annotations

from typing import Any

import grpc

from bench.router_steps import StepClock
from bench.router_worker import TOKEN_ID, TOKEN_TEXT
from headrace.v1 import inference_pb2 as pb

HANDLE_BYTES = 200
_SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name


class DirectAnswers:
    """The first token comes at once, the others at the ticks of the step clock."""

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    async def generate(self, request: pb.GenerateRequest, context: Any) -> None:
        """Answers `max_tokens` tokens."""
        num_tokens = request.sampling.max_tokens
        accepted = pb.Accepted(
            request_id="0" * 32, prompt_tokens=128, seed=1, resume_handle=bytes(HANDLE_BYTES)
        )
        await context.write(pb.GenerateResponse(accepted=accepted))
        for index in range(num_tokens):
            if index:
                await self._clock.step()
            delta = pb.Delta(first_index=index, token_ids=(TOKEN_ID,), text=TOKEN_TEXT)
            await context.write(pb.GenerateResponse(delta=delta))
        finished = pb.ChoiceFinished(reason=pb.FINISH_REASON_LENGTH, num_tokens=num_tokens)
        await context.write(pb.GenerateResponse(choice_finished=finished))
        usage = pb.Usage(prompt_tokens=128, completion_tokens=num_tokens, computed_tokens=128)
        timing = pb.Timing(prefill_s=0.001, decode_s=0.1, ttft_s=0.001, total_s=0.1)
        await context.write(pb.GenerateResponse(done=pb.Done(usage=usage, timing=timing)))


async def serve(clock: StepClock) -> tuple[grpc.aio.Server, str]:
    """The server, and its address."""
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    method = grpc.unary_stream_rpc_method_handler(
        DirectAnswers(clock).generate,
        request_deserializer=pb.GenerateRequest.FromString,
        response_serializer=pb.GenerateResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {"Generate": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"
