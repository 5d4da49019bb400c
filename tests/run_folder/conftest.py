"""A fixture of this folder alone."""

from __future__ import annotations

import pytest
from kit.checkpoints import NAME

from run_folder.files import RunFiles


@pytest.fixture
def files(tmp_path) -> RunFiles:
    return RunFiles(tmp_path, NAME)
