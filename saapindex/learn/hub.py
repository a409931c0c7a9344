"""Codebooks on the Hugging Face Hub: `save_pretrained`, `from_pretrained` and `push_to_hub`.

A repository holds ``codebook.safetensors``, a short ``config.json`` that names the model, and a card.
Importing this module needs `huggingface_hub`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from saapindex.codebook import FORMAT, Codebook
from saapindex.errors import FileFormatError, MissingDependencyError
from saapindex.learn.report import TrainingReport

try:
    from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
except ImportError as error:
    raise MissingDependencyError("huggingface_hub", "a codebook on the Hub", "hub") from error

__all__ = ["HubCodebook"]

FILE = "codebook.safetensors"
CONFIG = "config.json"


class HubCodebook(Codebook, ModelHubMixin, library_name="saapindex", tags=["attention", "ann", "kv-cache"]):
    """A codebook that the Hub can hold.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from saapindex.codebook import CodebookLayer
    >>> from saapindex.partition import View
    >>> part = CodebookLayer(0, views=[View()], centroids={2: np.eye(2)[None]}, q_heads=1, scale=1.0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = HubCodebook({0: part}, model_id="a/model").save_pretrained(folder)
    ...     HubCodebook.from_pretrained(folder).layers
    (0,)
    """

    @classmethod
    def of(cls, codebook: Codebook) -> HubCodebook:
        """Return a codebook as one that the Hub can hold, without copying it."""
        return cls(
            {number: codebook.layer(number) for number in codebook.layers},
            model_id=codebook.model_id,
            weights_hash=codebook.weights_hash,
            settings=codebook.settings,
            report=codebook.report,
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory / FILE)
        # Written here, so that the mixin does not write the whole settings and report.
        config = {"format": FORMAT, "base_model": self.model_id, "file": FILE}
        (save_directory / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **_: Any,
    ) -> HubCodebook:
        if Path(model_id).is_dir():
            path = Path(model_id) / FILE
            if not path.exists():
                raise FileFormatError(f"{model_id} holds no {FILE}: it is no codebook")
        else:
            path = Path(
                hf_hub_download(
                    repo_id=model_id,
                    filename=FILE,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        return cls.load(path)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return a card that names the model, says how to load the codebook and what was measured."""
        data = ModelCardData(
            library_name="saapindex",
            tags=sorted({"attention", "ann", "kv-cache", "saapindex"}),
            base_model=self.model_id,
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{self._card()}")

    def _card(self) -> str:
        name = self.model_id or "a model"
        nlists = ", ".join(map(str, self.layer(self.layers[0]).nlists))
        lines = [
            f"# saapindex codebook of {name}",
            "",
            f"Key partitions ({nlists} lists) and routers of {len(self.layers)} attention layers, for "
            "`saapindex`, which searches the key-value cache.",
            "",
            "```python",
            "from saapindex.learn.hub import HubCodebook",
            "",
            'codebook = HubCodebook.from_pretrained("THIS REPOSITORY")',
            "```",
        ]
        if self.report:
            report = TrainingReport.from_dict(self.report)
            lines += [
                "",
                f"Long-range attention mass found at {100 * report.share:g} % of the keys, held-out text, "
                f"mean over {len(report.heads)} KV heads:",
                "",
                "| lists | router | recall |",
                "|---|---|---|",
            ]
            for nlist in report.heads[0].lists if report.heads else ():
                means = report.mean_recall(nlist).items()
                lines += [f"| {nlist} | {rung} | {found:.3f} |" for rung, found in means]
        return "\n".join(lines) + "\n"
