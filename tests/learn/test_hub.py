"""Codebooks on the Hub, without a network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from saapindex.codebook import Codebook, CodebookLayer
from saapindex.errors import FileFormatError, MissingDependencyError
from saapindex.learn.report import HeadReport, ListsReport, TrainingReport
from saapindex.partition import View

hub = pytest.importorskip("huggingface_hub")
from saapindex.learn.hub import HubCodebook  # noqa: E402


@pytest.fixture
def codebook():
    centroids = np.random.default_rng(0).standard_normal((1, 4, 8)).astype(np.float16)
    layer = CodebookLayer(3, views=[View()], centroids={4: centroids}, q_heads=2, scale=0.5)
    lists = ListsReport("mean", {"mean": 0.875}, 0.9, 1.2)
    report = TrainingReport([HeadReport(3, 0, "rotated", {}, {4: lists})], ["b"], 0.05)
    settings = {"seed": 3, "model_id": "not this"}
    return Codebook(
        {3: layer}, model_id="a/model", weights_hash="f00d", settings=settings, report=report.to_dict()
    )


def test_a_folder_holds_all(codebook, tmp_path):
    HubCodebook.of(codebook).save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "codebook.safetensors",
        "config.json",
    ]
    assert json.loads((folder / "config.json").read_text())["base_model"] == "a/model"
    card = (folder / "README.md").read_text()
    assert "base_model: a/model" in card
    assert "| 4 | kept | 0.875 |" in card
    found = HubCodebook.from_pretrained(folder)
    assert isinstance(found, HubCodebook)
    assert (found.model_id, found.weights_hash, found.settings, found.report) == (
        codebook.model_id, codebook.weights_hash, codebook.settings, codebook.report,
    )  # fmt: skip
    np.testing.assert_array_equal(found.layer(3).centroids[4], codebook.layer(3).centroids[4])
    assert Codebook.load(folder / "codebook.safetensors").layers == (3,)


def test_pushing_uploads_the_folder(codebook, monkeypatch):
    calls = {}

    def create_repo(self, repo_id, **options):
        calls["repo"] = repo_id, options["private"]
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, commit_message, **_):
        calls["files"] = sorted(path.name for path in Path(folder_path).iterdir())
        calls["layers"] = Codebook.load(Path(folder_path) / "codebook.safetensors").layers
        return f"commit of {repo_id}: {commit_message}"

    monkeypatch.setattr(hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload_folder)
    said = HubCodebook.of(codebook).push_to_hub("me/codebook", private=True, commit_message="first")
    assert said == "commit of me/codebook: first"
    assert calls == {
        "repo": ("me/codebook", True),
        "files": ["README.md", "codebook.safetensors", "config.json"],
        "layers": (3,),
    }


def test_a_repository_is_downloaded_from(codebook, tmp_path, monkeypatch):
    HubCodebook.of(codebook).save_pretrained(tmp_path)
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options["revision"]))
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    monkeypatch.setattr("saapindex.learn.hub.hf_hub_download", download)
    found = HubCodebook.from_pretrained("me/codebook", revision="v1")
    assert asked == [("me/codebook", "config.json", "v1"), ("me/codebook", "codebook.safetensors", "v1")]
    assert found.layer(3).d == 8


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match=r"holds no codebook\.safetensors"):
        HubCodebook.from_pretrained(tmp_path)


def test_a_codebook_that_was_pulled_can_be_pushed_on(codebook, tmp_path):
    HubCodebook.of(codebook).save_pretrained(tmp_path / "a")
    HubCodebook.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("codebook.safetensors", "config.json", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "saapindex.learn.hub")
    with pytest.raises(MissingDependencyError, match=r"'huggingface_hub'.*saapindex\[hub\]"):
        import saapindex.learn.hub  # noqa: F401
