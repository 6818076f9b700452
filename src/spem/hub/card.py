"""The model card: what the network is, what was measured, how to load it, formula and citation."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from torch import nn

from spem.attention import attention_class, attention_parameters
from spem.attention.citing import bibtex
from spem.hub.measured import Measured


def card(
    model: nn.Module,
    config: dict[str, Any],
    results: Sequence[Measured],
    *,
    license: str | None,
    repo_id: str | None,
) -> str:
    """The text of `README.md`: metadata for the hub, then what a reader needs.

    Args:
        model: The network.
        config: What `config.json` says.
        results: What was measured; nothing else is claimed.
        license: Of the weights, or None.
        repo_id: Where it will be found; None leaves a place for it.
    """
    specs = _specs(config)
    name = _name(config)
    where = repo_id or "path/to/this/folder"
    attention = ", ".join(specs) or "none"
    extras = "hub" if config["network"]["kind"] == "spem.resnet" else "hub,timm"
    total = sum(p.numel() for p in model.parameters())
    lines = [
        "---",
        *_metadata(name, specs, results, license),
        "---",
        "",
        f"# {name}",
        "",
        f"{_what(config)} Attention: `{attention}`. {total:,} parameters, "
        f"{attention_parameters(model):,} of them attention's; {config['dtype']}.",
        "",
        "## Load",
        "",
        "```python",
        "import spem",
        "",
        f"model = spem.from_pretrained({json.dumps(where)})  # in evaluation mode, on the CPU",
        "```",
        "",
        "Nothing in the folder is executed: the weights are safetensors, the config is JSON. "
        f'Install, from a checkout of spem: `pip install ".[{extras}]"`.',
        "",
        *_images(config),
        "## Results",
        "",
        *_results(results),
        *_definitions(specs),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _specs(config: dict[str, Any]) -> list[str]:
    """The attentions of a network, each once."""
    texts = [config["network"].get("attention", "none")]
    texts += [call["attention"] for call in config["attach"]]
    return list(dict.fromkeys(text for text in texts if text != "none"))


def _name(config: dict[str, Any]) -> str:
    network = config["network"]
    plain = network.get("arch") or f"resnet{network['depth']}"
    return " + ".join([plain, *_specs(config)])


def _what(config: dict[str, Any]) -> str:
    network = config["network"]
    if network["kind"] == "spem.resnet":
        return (
            f"CIFAR ResNet of depth {network['depth']} ({network['block']} blocks), "
            f"{network['classes']} classes."
        )
    starts = {call["start"] for call in config["attach"]}
    how = f", attention attached with start={' and '.join(sorted(starts))}" if starts else ""
    return f"{network['kind']}'s {network['arch']}{how}."


def _metadata(
    name: str, specs: Sequence[str], results: Sequence[Measured], license: str | None
) -> list[str]:
    """YAML, its texts quoted as JSON does, which YAML reads."""
    tags = ["spem", "channel-attention", "image-classification", "pytorch"]
    tags += [spec.partition("(")[0] for spec in specs]
    sets = list(dict.fromkeys(_id(r.dataset) for r in results if "/" in _id(r.dataset)))
    metrics = list(dict.fromkeys(result.metric for result in results))
    lines = ["library_name: spem", "pipeline_tag: image-classification"]
    lines += [] if license is None else [f"license: {json.dumps(license)}"]
    for key, values in (("tags", dict.fromkeys(tags)), ("datasets", sets), ("metrics", metrics)):
        if values:
            lines += [f"{key}:", *(f"- {json.dumps(value)}" for value in values)]
    if not results:
        return lines
    lines += ["model-index:", f"- name: {json.dumps(name)}", "  results:"]
    for result in results:
        lines += [
            "  - task:",
            "      type: image-classification",
            "    dataset:",
            f"      name: {json.dumps(result.dataset)}",
            f"      type: {json.dumps(_id(result.dataset))}",
            f"      split: {json.dumps(result.split)}",
            "    metrics:",
            f"    - type: {json.dumps(result.metric)}",
            # In full: YAML takes 1e-05 for a text.
            f"      value: {Decimal(repr(result.value)):f}",
        ]
    return lines


def _id(dataset: str) -> str:
    """What the hub calls a set of this very name."""
    from spem.data import HUB_IDS  # reads images with numpy; not at import

    return HUB_IDS.get(dataset, dataset)


def _images(config: dict[str, Any]) -> list[str]:
    images = config["images"]
    if images is None:
        return []
    size = f" of {images['size']}x{images['size']} pixels" if images["size"] else ""
    return [
        f"Images{size}, red, green and blue, as (pixels / 255 - mean) / std with "
        f"mean {images['mean']} and std {images['std']}.",
        "",
    ]


def _results(results: Sequence[Measured]) -> list[str]:
    if not results:
        return ["No results are stated.", ""]
    rows = [
        f"| {_cell(r.dataset)}, {_cell(r.split)} | {_cell(r.metric)} | {r.value:.6g} "
        f"| {_cell(r.note) or '-'} |"
        for r in results
    ]
    return [
        "Measured; accuracies in percent.",
        "",
        "| on | metric | value | how |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _definitions(specs: Sequence[str]) -> list[str]:
    """Formula and citation of every attention."""
    if not specs:
        return []
    names = list(dict.fromkeys(str(spec).partition("(")[0] for spec in specs))
    lines = ["## Attention", ""]
    for name in names:
        lines += [f"`{name}`:", "", "```text", *formula(name), "```", ""]
    lines += ["## Citation", "", "```bibtex"]
    for name in names:
        if attention_class(name).paper:
            lines.append(bibtex(name))
    return [*lines, "```", ""]


def formula(name: str) -> list[str]:
    """The lines of the formula in the docstring of a registered attention."""
    text = inspect.getdoc(attention_class(name)) or ""
    found = re.search(r"^Formula:\n((?:    .*\n|\n)+)", text + "\n", re.M)
    if found is None:
        return [text.partition("\n")[0]]
    return [line.removeprefix("    ") for line in found[1].rstrip().splitlines()]
