"""A made-up study and its page, which tests of reports share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.longer.report_page import Page, written
from tests.unit.report_study import make_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("results") / "fashion")


@pytest.fixture(scope="module")
def page(study: Path) -> Page:
    return written(study)
