"""Loading of language models for capture, and the fingerprint that ties a trace to its weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saapindex.errors import InvalidInputError, MissingDependencyError
from saapindex.rope import Rope

if TYPE_CHECKING:
    import torch

__all__ = ["LoadedModel", "decoder_of", "load_model", "weights_hash"]

SAMPLED = 4096
"""Elements of each tensor that `weights_hash` reads."""


class LoadedModel(NamedTuple):
    """A model that is ready to read.

    Attributes
    ----------
    model
        A decoder of transformers.
    tokenizer
        Its tokenizer: ``tokenizer(text, add_special_tokens=...).input_ids``.
    name
        What traces call it.
    """

    model: Any
    tokenizer: Any
    name: str


def import_transformers() -> Any:
    """Return the module, or say what to install."""
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise MissingDependencyError(error.name or "transformers", "capturing a trace", "capture") from error
    return transformers


def load_model(
    model: str | os.PathLike[str],
    *,
    context: int | None = None,
    rope_scaling: str | Mapping[str, Any] | None = None,
    device: str | None = None,
    dtype: str = "bfloat16",
) -> LoadedModel:
    """Load a causal language model and its tokenizer, for a context of `context` tokens.

    Parameters
    ----------
    model
        A Hub id, a folder, or a GGUF file.
    context
        Tokens to be read.
    rope_scaling
        How the rotary embedding is stretched to `context`, see `stretched`.
    device
        Where the model goes. Default: ``"cuda"`` where there is one, else ``"cpu"``.
    dtype
        What the model computes in. GGUF weights are widened to it.

    Raises
    ------
    InvalidInputError
        If the model cannot be found or loaded, or `rope_scaling` does not fit it.
    MissingDependencyError
        If transformers (or, for a GGUF file, gguf) is not installed.
    """
    transformers = import_transformers()
    import torch

    source, options, name = _source(model, transformers)
    computed = getattr(torch, dtype, None)
    if not isinstance(computed, torch.dtype):
        raise InvalidInputError(f"dtype is {dtype!r}, expected one of torch, such as 'bfloat16'")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **_only(options, "gguf_file"))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=computed, **options)
        loaded = loaded.to(place).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InvalidInputError(f"cannot load the model {os.fspath(model)!r}: {error}") from error
    decoder = decoder_of(loaded)
    parameters = stretched(decoder.config, rope_scaling, context)
    if parameters is not None:
        decoder.config.rope_parameters = parameters
        if not hasattr(decoder, "rotary_emb"):
            raise InvalidInputError(
                f"{type(decoder).__name__} has no rotary_emb of its own, expected one to scale: "
                "set rope_parameters in the config.json of a local copy"
            )
        decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config).to(place)
    return LoadedModel(loaded, tokenizer, name)


def _only(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


def _source(model: str | os.PathLike[str], transformers: Any) -> tuple[str, dict[str, Any], str]:
    """Return what `from_pretrained` takes, its options, and a name for the model."""
    text, path = os.fspath(model), Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InvalidInputError(f"cannot load the model {text!r}: there is no such file")
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError("gguf", "reading a GGUF file", "capture") from error
        options: dict[str, Any] = {"gguf_file": path.name}
        if hasattr(transformers, "GgufConfig"):  # since it can also keep weights packed, which is slower
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        return str(path.parent), options, path.stem
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = sorted(file.name for file in path.glob("*.gguf"))
            hint = f"; give the file, {path / found[0]}" if found else ""
            raise InvalidInputError(f"cannot load the model {text!r}: the folder has no config.json{hint}")
        return text, {}, path.resolve().name
    if path.is_absolute() or text.startswith((".", "~")):
        raise InvalidInputError(f"cannot load the model {text!r}: there is no such folder")
    return text, {}, text


def decoder_of(model: Any) -> Any:
    """Return the text decoder of a model, without its language-modelling head and image encoders."""
    return model.get_decoder()


def stretched(
    config: Any, scaling: str | Mapping[str, Any] | None, context: int | None
) -> dict[str, Any] | None:
    """Return the ``rope_parameters`` of a model whose context is stretched, or None if they stay.

    Parameters
    ----------
    config
        A text config of transformers.
    scaling
        Past the model's ``max_position_embeddings``: None refuses, ``"none"`` changes nothing, ``"ntk"``
        raises the base to ``theta * s ** (dim / (dim - 2))`` with ``s = context / max_position_embeddings``,
        and ``"yarn"`` and ``"linear"`` scale by the factor `s`. Within it these change nothing. A dict is
        merged into the model's own parameters, whatever the context: ``{"rope_type": "yarn", "factor": 4.0,
        "original_max_position_embeddings": 32768}``. Where layers have parameters by type (Gemma 3), those
        of ``"full_attention"`` are meant: local layers see no more than their window.
    context
        Tokens to be read; None for no more than the model's own.

    Raises
    ------
    InvalidInputError
        If `scaling` is unknown, is needed but missing, or does not fit the scaling that the model has.

    Examples
    --------
    >>> config = {"rope_theta": 1e4, "head_dim": 64, "max_position_embeddings": 2048}
    >>> stretched(config, "linear", 8192)
    {'rope_theta': 10000.0, 'rope_type': 'linear', 'factor': 4.0}
    """
    named = ("none", "ntk", "yarn", "linear")
    if not (scaling is None or scaling in named or isinstance(scaling, Mapping)):
        raise InvalidInputError(f"rope_scaling is {scaling!r}, expected one of {named}, or a dict")

    def read(name: str) -> Any:
        return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)

    trained = read("max_position_embeddings")
    factor = 1.0 if context is None or not trained else context / trained
    if not isinstance(scaling, Mapping) and (factor <= 1 or scaling == "none"):
        return None
    if scaling is None:
        raise InvalidInputError(
            f"context is {context}, but the model was trained for {trained} positions: give rope_scaling "
            "'ntk', 'yarn', 'linear' or a dict, or 'none' to go beyond them all the same"
        )
    everything = dict(read("rope_parameters") or {"rope_theta": read("rope_theta")})
    nested = isinstance(everything.get("full_attention"), Mapping)
    own = dict(everything["full_attention"]) if nested else everything
    kind = own.get("rope_type") or "default"
    if isinstance(scaling, Mapping):
        kept = _only(own, "rope_theta", "partial_rotary_factor")
        new = {**kept, **scaling}
        if "rope_type" not in new:
            raise InvalidInputError(f"rope_scaling is {json.dumps(new)}, expected a rope_type in it")
    elif scaling == "ntk" and kind in ("default", "linear", "llama3", "yarn"):
        rope = Rope.from_config(config)
        new = {**own, "rope_theta": rope.theta * factor ** (rope.dim / (rope.dim - 2))}
    elif scaling != "ntk" and kind == "default":
        new = {**own, "rope_type": scaling, "factor": factor}
        if scaling == "yarn":
            new["original_max_position_embeddings"] = trained
    else:
        raise InvalidInputError(
            f"rope_scaling is {scaling!r}, but the model already has rope_type {kind!r}: give the whole "
            f"rope_parameters as a dict; they are {json.dumps(own)}"
        )
    result = {**everything, "full_attention": new} if nested else new
    Rope.from_config(
        {**_settings(config), "rope_parameters": result}, context=context
    )  # or it says what is wrong
    return result


def _settings(config: Any) -> dict[str, Any]:
    return dict(config) if isinstance(config, Mapping) else dict(config.to_dict())


def weights_hash(model: Any) -> str:
    """Return a fingerprint of the weights of a model's decoder.

    SHA-256 over each tensor of the decoder's state dict, in order of name: its name, dtype, shape, and the
    bytes of 4096 elements at even distances (of all, if it has no more). The same on every device; another
    dtype or quantisation is another fingerprint. Rotary tables and the language-modelling head do not count.

    Parameters
    ----------
    model
        A model of transformers.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    InvalidInputError
        If a tensor is not in memory (on the ``meta`` device).
    """
    import torch

    digest = hashlib.sha256()
    tensors: dict[str, torch.Tensor] = decoder_of(model).state_dict()
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta:
            raise InvalidInputError(f"the weights {name} are not in memory, expected a model that is loaded")
        flat = tensor.detach().reshape(-1)
        if len(flat) > SAMPLED:
            flat = flat[torch.arange(SAMPLED, device=flat.device) * len(flat) // SAMPLED]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
