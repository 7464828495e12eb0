"""One real SGLang server for the session, serving the toy task's generator."""

from pathlib import Path

import pytest
from real_server import real_server, why_not

import spark_nemo.toy

MODEL = Path(spark_nemo.toy.__file__).parent / "assets" / "generator"
OTHER_MODEL = MODEL.parent / "verifier"


def pytest_collection_modifyitems(items):
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = why_not() if here else None
    for item in here:
        item.add_marker(pytest.mark.sglang)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return MODEL


@pytest.fixture(scope="session")
def other_folder() -> Path:
    return OTHER_MODEL


@pytest.fixture(scope="session")
def real(tmp_path_factory, model_folder):
    """A server with the toy generator. Tests leave it unpaused and with the generator's weights,
    version 0.
    """
    with real_server(model_folder, tmp_path_factory.mktemp("sglang") / "server.log") as server:
        yield server
