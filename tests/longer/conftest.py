"""A synthetic study and its page, shared by the tests of reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.longer.report_page import Page, rendered
from tests.unit.report_study import make_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("results") / "fashion")


@pytest.fixture(scope="module")
def page(study: Path) -> Page:
    return rendered(study)
