"""Header lists of gRPC calls: what is written is read again, and what is none is refused."""

import grpc
import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc import heads
from rpc.heads import BadHead, Status

pytestmark = pytest.mark.unit

KEYS = st.from_regex(r"[a-z][a-z0-9_.]{0,20}", fullmatch=True).filter(lambda key: not key.startswith("grpc"))
ASCII = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=200).map(str.strip)
METADATA = st.lists(
    st.one_of(st.tuples(KEYS, ASCII), st.tuples(KEYS.map("{}-bin".format), st.binary(max_size=300)))
)


def decoded(block):
    return hpack.Decoder().decode(block, raw=True)


@given(metadata=METADATA, path=st.from_regex(r"/[a-zA-Z0-9.]{1,150}/[a-zA-Z]+", fullmatch=True))
def test_a_request_is_read_as_it_was_written(metadata, path):
    metadata = [(key, value) for key, value in metadata if key not in ("te", "content-type")]
    head = heads.parse_request(decoded(heads.request("host:80", path, metadata)))
    assert (head.path, head.timeout_s, list(head.metadata)) == (path, None, metadata)


@given(code=st.sampled_from(grpc.StatusCode), details=st.text(max_size=300), metadata=METADATA)
def test_a_status_is_read_as_it_was_written(code, details, metadata):
    metadata = tuple((key, value) for key, value in metadata if key not in ("te", "content-type"))
    status = Status(code, details, metadata)
    assert heads.parse_status(decoded(heads.trailers(status))) == status


@pytest.mark.parametrize(
    "text, timeout_s", [("5S", 5.0), ("250m", 0.25), ("1H", 3600.0), ("99999999n", 0.099999999)]
)
def test_timeouts_have_units(text, timeout_s):
    assert heads.parse_timeout(text) == pytest.approx(timeout_s)


@pytest.mark.parametrize("text", ["", "5", "S", "-5S", "1.5S", "123456789S", "5X", "٣S"])
def test_what_is_no_timeout_is_refused(text):
    with pytest.raises(BadHead) as caught:
        heads.parse_timeout(text)
    assert caught.value.http_status == 400


@pytest.mark.parametrize(
    "method, content_type, http_status",
    [(b"GET", b"application/grpc", 405), (b"POST", b"application/json", 415), (b"POST", b"", 415)],
)
def test_what_is_no_call_is_refused(method, content_type, http_status):
    with pytest.raises(BadHead) as caught:
        heads.parse_request([(b":method", method), (b":path", b"/"), (b"content-type", content_type)])
    assert caught.value.http_status == http_status


def test_metadata_that_is_not_base64_is_refused():
    with pytest.raises(BadHead):
        heads.parse_request([(b"some-bin", b"a")])


def test_headers_of_a_response_bring_no_status_yet():
    assert heads.parse_status(decoded(heads.RESPONSE)) is None


def test_an_answer_of_another_kind_of_server_is_a_status_too():
    status = heads.parse_status([(b":status", b"502")])
    assert status is not None and (status.code.name, status.details) == ("UNAVAILABLE", "HTTP status 502")
