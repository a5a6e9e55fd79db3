"""Live Future Attention and Live Memory as nodes: what they ask for, say and refuse."""

import types

import pytest
import torch

pytestmark = pytest.mark.comfy

INPUTS = {
    "frames": 3, "interval": 2, "bank": "queue", "fuse": 0.4, "threshold": 0.5, "levels": "all",
    "carry": 0.5,
}  # fmt: skip


@pytest.fixture
def said(comfyui, monkeypatch):
    """What the node is told to say, newest last."""
    from livediffusion.nodes import coherence

    lines = []
    monkeypatch.setattr(coherence, "teller", lambda node: lines.append)
    monkeypatch.setattr(
        coherence.LiveMemory, "hidden", types.SimpleNamespace(unique_id="7"), raising=False
    )
    with torch.inference_mode():
        yield lines


def remembering(model, preset, **inputs):
    from livediffusion.nodes.coherence import LiveMemory

    return LiveMemory.execute(model, preset, **{**INPUTS, **inputs}).args[0]


def attending(model, levels):
    from livediffusion.nodes.coherence import LiveFutureAttention

    return LiveFutureAttention.execute(model, levels).args[0]


def test_off_is_the_model_itself(said):
    import tiny

    model = tiny.model()
    assert remembering(model, "off") is model
    assert attending(model, "off") is model


def test_presets_ignore_the_other_inputs_and_custom_takes_them(said):
    import tiny
    from livediffusion.engine.coherence.carry import Carry
    from livediffusion.engine.coherence.neighbours import Memory
    from livediffusion.host.models.coherence import coherence_of
    from livediffusion.nodes.coherence import CUSTOM, PRESETS

    def asked(preset):
        known = coherence_of(remembering(tiny.model(), preset))
        return known.memory, known.carry

    assert {name: asked(name) for name in PRESETS} == PRESETS
    own = {name: value for name, value in INPUTS.items() if name != "carry"}
    assert asked(CUSTOM) == (Memory(**own), Carry.of(0.5))


def test_the_schema_shows_what_is_offered(comfyui):
    """The inputs begin with what the preset has that is chosen first: custom is that, until
    something is changed."""
    from livediffusion.engine.coherence.carry import Carry
    from livediffusion.engine.coherence.neighbours import Memory
    from livediffusion.nodes.coherence import PRESETS, LiveMemory

    given = {one.id: one for one in LiveMemory.define_schema().inputs}
    shown = {name: given[name].default for name in INPUTS}
    carried = Carry.of(shown.pop("carry"))
    assert (Memory(**shown), carried) == PRESETS[given["preset"].default]


def test_the_node_tells_how_large_the_memory_is(said):
    import pairs
    import tiny
    from livediffusion.host.sampling.stream import Stream

    model = remembering(tiny.model(), "custom", interval=1, carry=0.0)
    stream, guider = Stream(), pairs.guider(model)
    for i in range(6):
        stream.run(guider, tiny.latents(1, i, 32), pairs.settings())
    # 4 slots, 3 frames, 256 tokens: keys and values of 3 layers, outputs and lengths of 2
    size = 4 * 3 * 256 * (3 * 2 * 64 + 2 * 65) * 4
    assert stream.coherent.neighbours.bank.size == size
    # and what rows write, of which there were one, two, three and four
    size += 10 * 256 * (3 * 2 + 2) * 64 * 4
    assert said[-1] == f"memory: {size / 2**20:.1f} MB"
    assert stream.stats()["memory"] == f"3 layers, {size / 2**20:.1f} MB"
    before = len(said)
    for i in range(6, 10):
        stream.run(guider, tiny.latents(1, i, 32), pairs.settings())
    assert len(said) == before, "it is said when it changes"


def kept(*owners):
    """Bytes of all tensors that these hold on to, wherever they are."""
    found, seen, todo = {}, set(), list(owners)
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, dict):
            todo += one.values()
        elif isinstance(one, (list, tuple, set, frozenset)):
            todo += one
        elif type(one).__module__.startswith("livediffusion."):
            todo.append(vars(one))
    return sum(found.values())


@pytest.mark.parametrize("preset", ["calm", "calmer", "custom"])
def test_what_is_told_is_all_that_is_kept(said, preset):
    """But for numbers of rows, and the picture by which motion is seen."""
    import pairs
    import tiny
    from livediffusion.host.sampling.stream import Stream

    stream, lines = Stream(), len(said)
    guider = pairs.guider(remembering(tiny.model(), preset, interval=2), "full")
    for i in range(10):
        stream.run(guider, tiny.latents(1, i, 32), pairs.settings())
        size = kept(stream.coherent.neighbours, stream.coherent.carrying)
        told = stream.stats()
        assert told["memory_mb"] + told["carried_mb"] == pytest.approx(size / 2**20, rel=0.01), i
    assert len(said) > lines
    assert float(said[-1].split()[1]) == pytest.approx(size / 2**20, rel=0.01, abs=0.05)


@pytest.mark.parametrize("family", ["SD3", "Flux", "Lumina2"])
def test_models_without_such_attention_are_refused_in_words(said, family):
    import families

    model = families.model(family)
    for refused in (lambda: attending(model, "all"), lambda: remembering(model, "calm")):
        with pytest.raises(ValueError, match=r"^model: .*self-attention"):
            refused()
    families.forget()


def of_another_pack(executor, *args, **kwargs):
    return executor(*args, **kwargs)


def test_a_wrapper_of_another_pack_under_our_key_is_left_alone(comfyui):
    import tiny
    from comfy.patcher_extension import WrappersMP
    from livediffusion.engine.coherence.neighbours import Future, Memory
    from livediffusion.host.models import engines, looks
    from livediffusion.host.models.coherence import attach, coherence_of

    def wrappers(model):
        return model.get_wrappers(WrappersMP.DIFFUSION_MODEL, looks.COHERENCE)

    model = tiny.model()
    key = WrappersMP.DIFFUSION_MODEL, looks.COHERENCE
    model.add_wrapper_with_key(*key, of_another_pack)
    assert coherence_of(model) is None
    # nobody knows what it looks at
    assert looks.most(looks.of_patcher(model))[0] is looks.Look.FRAME
    helped = attach(attach(model, future=Future("all")), memory=Memory(2, 2, "queue", 0.4, 0.5))
    assert coherence_of(helped).future and coherence_of(helped).memory
    assert wrappers(helped)[0] is of_another_pack and len(wrappers(helped)) == 2
    assert wrappers(model) == [of_another_pack]
    # whoever comes after ours, too
    last = attach(tiny.model(), future=Future("all"))
    last.add_wrapper_with_key(*key, of_another_pack)
    assert coherence_of(attach(last, future=None)).future is None
    assert of_another_pack in wrappers(attach(last, future=None))
    plain = attach(tiny.model(), future=Future("all"))
    # an engine goes around ours, and not around what is another's
    names = ("apply_model", "diffusion_model", "loaded", "unloaded")
    engine = types.SimpleNamespace(**dict.fromkeys(names, lambda *args: None))
    for one, order in ((model, [looks.COHERENCE, looks.ENGINE]),
                       (plain, [looks.ENGINE, looks.COHERENCE])):  # fmt: skip
        assert list(engines.attach(one, engine).wrappers[key[0]]) == order
    assert looks.most(looks.of_patcher(plain))[0] is looks.Look.ROWS
