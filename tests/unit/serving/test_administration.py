"""Who may change what is served."""

from __future__ import annotations

import pytest

from narrowcast.errors import ConfigError
from narrowcast.serving.administration import check_administrator, check_token
from narrowcast.serving.refusals import Refusal


@pytest.mark.parametrize("sent", ["Bearer s3cret", "bearer s3cret", "BEARER s3cret"])
def test_the_scheme_is_written_as_anybody_likes(sent: str) -> None:
    """RFC 9110, 11.1: it is case-insensitive; the token is not."""
    check_administrator("s3cret", sent.encode())


@pytest.mark.parametrize("sent", ["", "Bearer", "Bearer ", "s3cret", "Basic s3cret", "Bearer S3CRET", "Bearer  s3cret"])
def test_nothing_else_is_taken_for_the_token(sent: str) -> None:
    with pytest.raises(Refusal) as caught:
        check_administrator("s3cret", sent.encode())
    assert caught.value.status == 401


@pytest.mark.parametrize("token", [None, ""])
@pytest.mark.parametrize("sent", ["", "Bearer ", "Bearer x"])
def test_without_a_token_nobody_is_an_administrator(token: str | None, sent: str) -> None:
    """An empty token, as an unset variable gives it, is none."""
    with pytest.raises(Refusal) as caught:
        check_administrator(token, sent.encode())
    assert caught.value.status == 403


def test_a_token_of_any_bytes() -> None:
    """Variables of the environment need not be text."""
    check_administrator(b"\xff\xfe".decode(errors="surrogateescape"), b"Bearer \xff\xfe")


@pytest.mark.parametrize("token", ["", " ", "token\n", " token", "to\x00ken"])
def test_a_token_that_no_header_can_carry_is_refused(token: str) -> None:
    with pytest.raises(ConfigError, match="token"):
        check_token(token)
