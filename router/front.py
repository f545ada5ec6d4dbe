"""The gRPC front door for applications: reads calls, writes answers, decides nothing."""

from headrace.v1 import inference_pb2 as pb
from headrace.v1 import inference_pb2_grpc
from router.auth import Authenticator
from router.book import RequestBook
from router.config import ModelFacts
from router.core import admission
from router.core.admission import Limits
from router.core.failures import Rejection, invalid
from router.errors import end_with, error_detail, unknown_request
from router.intake import Call, Intake
from router.prompts import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from router.requests import Attachment, RequestKey
from rpc.call import ServerCall


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Serves headrace.v1.Inference; a Rejection becomes a status in `errors.guarded`."""

    def __init__(
        self,
        authenticator: Authenticator,
        intake: Intake,
        book: RequestBook,
        model: ModelFacts,
        limits: Limits,
    ) -> None:
        self._authenticator = authenticator
        self._intake = intake
        self._book = book
        self._model = model
        self._limits = limits

    def Generate(self, request: pb.GenerateRequest, call: ServerCall) -> None:  # type: ignore[override] # pushes
        """Streams the answer to a prompt."""
        self._answer(request, _generate_prompt(request), call)

    def Chat(self, request: pb.ChatRequest, call: ServerCall) -> None:  # type: ignore[override] # pushes
        """Streams the answer to a conversation."""
        self._answer(request, ChatPrompt(request.messages), call)

    async def Cancel(self, request: pb.CancelRequest, call: ServerCall) -> pb.CancelResponse:
        """Ends a request wherever it is."""
        known = self._book.get(self._key(request.request_id, call))
        return pb.CancelResponse(was_running=known is not None and self._book.cancel(known))

    async def Get(self, request: pb.GetRequest, call: ServerCall) -> pb.GetResponse:
        """Reads the state of a request."""
        known = self._book.get(self._key(request.request_id, call))
        if known is None:
            raise unknown_request(request.request_id)
        response = pb.GetResponse(
            request_id=known.key.request_id,
            state=f"REQUEST_STATE_{known.lifecycle.state}",
            prompt_tokens=known.accepted.prompt_tokens if known.accepted else 0,
            completion_tokens=known.answer.num_tokens,
        )
        if known.failure is not None:
            response.error.CopyFrom(error_detail(known.failure, known.key.request_id, known.attempt))
        return response

    async def Tokenize(self, request: pb.TokenizeRequest, call: ServerCall) -> pb.TokenizeResponse:
        """Turns text or messages into token ids."""
        self._authenticator.tenant(call.invocation_metadata())
        admission.check_model(request.model, self._limits)
        prompt: Prompt = TextPrompt(request.text)
        if request.WhichOneof("input") == "chat":
            prompt = ChatPrompt(request.chat.messages)
        prompt.check(self._limits)
        return pb.TokenizeResponse(token_ids=await self._intake.tokenize(prompt))

    async def Models(self, request: pb.ModelsRequest, call: ServerCall) -> pb.ModelsResponse:
        """Lists the one model."""
        self._authenticator.tenant(call.invocation_metadata())
        model = self._model
        return pb.ModelsResponse(
            models=[
                pb.Model(
                    name=model.name,
                    architecture=model.architecture,
                    max_context=model.max_context,
                    digest=model.digest,
                )
            ]
        )

    def _answer(self, request: pb.GenerateRequest | pb.ChatRequest, prompt: Prompt, call: ServerCall) -> None:
        asked = Call(
            tenant=self._authenticator.tenant(call.invocation_metadata()),
            request_id=request.request_id,
            model=request.model,
            prompt=prompt,
            sampling=request.sampling,
            timeout_s=request.timeout_s,
            remaining_s=call.time_remaining(),
            resumable=request.resumable,
            next_index=request.next_index,
            resume_handle=request.resume_handle,
            priority=request.priority,
            wants_direct=request.direct,
        )
        try:
            attachment = self._intake.open(asked)
        except Rejection as rejection:
            # Cut, since it travels in a header and may itself be what was wrong.
            rejection.request_id = request.request_id[: admission.MAX_REQUEST_ID_CHARS]
            raise
        deliver(attachment, call, self._book)

    def _key(self, request_id: str, call: ServerCall) -> RequestKey:
        tenant = self._authenticator.tenant(call.invocation_metadata())
        if not request_id:
            raise invalid("BAD_REQUEST_ID", "request_id is empty")
        admission.check_request_id(request_id)
        return RequestKey(tenant, request_id)


def _generate_prompt(request: pb.GenerateRequest) -> Prompt:
    if request.WhichOneof("prompt") == "token_ids":
        return TokenPrompt(request.token_ids.ids)
    return TextPrompt(request.text)


def deliver(attachment: Attachment, call: ServerCall, book: RequestBook) -> None:
    """Sends a client what its attachment has, from now on and whenever there is news and room, to the end of either."""

    def go_on() -> None:
        try:
            while call.is_writable:
                for message in attachment.take():
                    call.send_serialized(message)
                if attachment.is_caught_up:
                    break
            if attachment.has_ended:
                call.end()
        except Exception as error:  # noqa: BLE001 - the boundary: whoever brings news must not stumble over one client
            end_with(call, error)

    attachment.on_news = call.on_writable = go_on
    call.on_over = lambda: book.detach(attachment)
    go_on()
