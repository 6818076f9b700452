"""The edges of the contract: bad input, empty batches, small maps, other ranks, NaN."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from attention.registered import ALL, EVERY, SIZE, C, drawn, fresh, maps, refused, sampled
from tolerance import TOLERANCE

import spem


@EVERY
def test_what_is_no_map_of_its_channels_is_refused_in_one_sentence(name: str) -> None:
    """The message names the module and what was found; nothing foreign comes from inside torch."""
    module = drawn(name)
    label = type(module).__name__
    for shape in ((4, C), (C,), (4, C, 2, 2, 2, 2)):
        with pytest.raises(ValueError, match=rf"{label}.*[(\[]{', '.join(map(str, shape))}"):
            module(torch.zeros(shape))
    for channels in (C // 2, C + 1, 1):
        found = rf"{label}.*\b({C}\b.*\b{channels}|{channels}\b.*\b{C})\b"
        with pytest.raises(ValueError, match=found):
            module(torch.zeros(4, channels, 5, 7))
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        with pytest.raises((TypeError, ValueError), match=rf"{label}.*{dtype}"):
            module(torch.zeros(4, C, 5, 7, dtype=dtype))
    for size in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match=r"empty|at least"):
            module(torch.zeros(4, C, *size))
    x = maps()
    for other in (None, x.tolist(), x.numpy(), 3.0, "map"):
        with pytest.raises(TypeError, match=rf"{label}: needs a map .*{type(other).__name__}"):
            module(other)
    if list(module.parameters()):
        with pytest.raises(ValueError, match=rf"{label}: the map is on the meta device"):
            module(x.to("meta"))
    assert fresh(name, device="meta")(x.to("meta")).shape == x.shape
    for channels in (0, -4, True, 2.0):
        with pytest.raises(ValueError, match=rf"channels={channels}"):
            spem.create_attention(name, channels, size=SIZE)


def test_what_is_no_spec_is_refused_in_one_sentence() -> None:
    for wrong in (64, None, spem.SE, spem.SE(64), ["se"]):
        with pytest.raises(TypeError, match=r"the spec, a text.*comes first.*'se', 64"):
            spem.create_attention(wrong, 64)
    for wrong in (spem.SE, spem.SE(64), 3):
        with pytest.raises(TypeError, match=r"attention is a text like.*Write 'se'"):
            spem.resnet(11, attention=wrong)


@pytest.mark.parametrize(("name", "training"), sampled(ALL, (True, False), each=1))
def test_empty_batch(name: str, training: bool) -> None:
    module = drawn(name, training=training)
    before = [b.clone() for b in module.buffers()]
    x = torch.zeros(0, C, 5, 7, requires_grad=True)
    out = module(x)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    out.sum().backward()
    assert x.grad.shape == x.shape
    for buffer, old in zip(module.buffers(), before, strict=True):
        assert torch.isfinite(buffer.double()).all()
        if buffer.is_floating_point():
            assert torch.equal(buffer, old), "no sample may move a running statistic"


@pytest.mark.parametrize(("name", "training"), sampled(ALL, (True, False), each=1))
def test_small_maps_and_single_samples(name: str, training: bool) -> None:
    """They work, or are refused with the need that the module declares."""
    for batch, size in product((1, 4), ((1, 1), (1, 5), (4, 1), (5, 7))):
        module = drawn(name, training=training)
        x = maps(torch.float32, batch, C, *size).requires_grad_()
        if refused(name, batch=batch, pixels=size[0] * size[1], training=training):
            with pytest.raises(ValueError, match=type(module).__name__):
                module(x)
            continue
        out = module(x)
        assert out.shape == x.shape
        assert torch.isfinite(out).all()
        out.square().sum().backward()
        assert torch.isfinite(x.grad).all()


def test_only_the_declared_modules_refuse_small_input() -> None:
    """SGE needs two pixels, SRM two training samples; no other published module may refuse."""
    assert refused("sge", batch=4, pixels=1, training=False)
    assert not refused("sge", batch=1, pixels=2, training=True)
    assert refused("srm", batch=1, pixels=4, training=True)
    assert not refused("srm", batch=1, pixels=4, training=False)
    assert not refused("srm", batch=2, pixels=4, training=True)
    assert refused("simam", batch=4, pixels=1, training=False)
    for name in ("cbam", "nam", "triplet", "gsop"):  # one value has no batch variance
        assert refused(name, batch=1, pixels=1, training=True)
        assert not refused(name, batch=1, pixels=1, training=False)
        assert not refused(name, batch=2, pixels=1, training=True)
    for name in ("spem", "se", "eca", "scale", "gct", "ese", "ge", "fca", "coord", "gc", "ela"):
        assert not refused(name, batch=1, pixels=1, training=True)


def test_the_refusals_name_the_need() -> None:
    with pytest.raises(ValueError, match=r"SGE.*(2|two).*1"):
        drawn("sge")(torch.zeros(4, C, 1, 1))
    with pytest.raises(ValueError, match=r"SRM.*(2|two).*1"):
        drawn("srm")(torch.zeros(1, C, 5, 7))


@EVERY
def test_extra_ranks(name: str) -> None:
    """A module that writes gate_from takes lines and volumes; the others refuse by name."""
    module = drawn(name, training=False)
    takes = 3 in module.ranks
    assert module.ranks == ((3, 4, 5) if takes else (4,))
    for shape in ((2, C, 9), (2, C, 2, 3, 4)):
        x = maps(torch.float32, *shape)
        if takes:
            assert module(x).shape == shape
        else:
            with pytest.raises(ValueError, match=type(module).__name__):
                module(x)
    not_a_number_stays_in_its_sample_and_is_not_hidden(name)


def test_which_modules_are_functions_of_plane_statistics() -> None:
    for name in ("spem", "se", "eca", "srm", "gct", "ese", "ge"):
        cls = type(spem.create_attention(name, C))
        assert cls.gate_from is not spem.ChannelAttention.gate_from, name
        x = maps(torch.float64)
        module = drawn(name, torch.float64, training=False)
        stats = spem.ops.plane_stats(x)
        gate = module.gate_from(stats)
        assert gate.shape == x.shape[:2]
        torch.testing.assert_close(
            gate[..., None, None], module.gate(x), **TOLERANCE[torch.float64]
        )


def not_a_number_stays_in_its_sample_and_is_not_hidden(name: str) -> None:
    module = drawn(name, torch.float64, training=False)
    clean = maps(torch.float64)
    x = clean.clone()
    x[1, 3, 2, 2] = float("nan")
    out = module(x)
    assert torch.isnan(out[1, 3, 2, 2])
    keep = [0, 2, 3]
    torch.testing.assert_close(out[keep], module(clean)[keep], **TOLERANCE[torch.float64])
