"""One fork server with vLLM for all tests of a session: importing it takes ten seconds of CPU time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kit.vllm_zygote import Zygote


@pytest.fixture(scope="session")
def forked() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    zygote.close()
