"""Networks whose weights come page by page (ComfyUI's dynamic VRAM), under everything in the pack
that copies a network: a copy owns nothing of the network that it is of."""

import copy
import functools
import gc
import weakref

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.comfy


@pytest.fixture(autouse=True)
def inference(comfyui):
    with torch.inference_mode():
        yield


@pytest.fixture
def lib():
    import paging

    with paging.library() as lib:
        yield lib


def paged_unet():
    """A MODEL of which ComfyUI has loaded the weights by pages; the patcher that has."""
    import paging
    import tiny

    model = tiny.model()
    return model, paging.page(model.model)


def paged_vae():
    import paging
    import vaes

    vae = vaes.taesd()
    vae.patcher = paging.page(vae.first_stage_model)
    return vae


def counted(model):
    from livediffusion.host.models.flops import cost_of

    assert cost_of(model.model.diffusion_model, (4, 8, 8), 8).whole > 0


def searched(model):
    from livediffusion.host.models import skips

    assert skips.cost(model, (8, 8), 8).whole > 0


def reused(model):
    """A stream of Live Reuse, without an engine."""
    import pairs
    import tiny
    from helping import helping
    from livediffusion.host.sampling.stream import Stream

    stream, guider = Stream(1), pairs.guider(helping(model, reuse={}))
    for i in range(3):
        stream.run(guider, tiny.latents(1, i), pairs.settings())


def traced(model):
    from livediffusion.compiled.engine import WeightsAway
    from livediffusion.host.models.unet import ComfyUNet

    with pytest.raises(WeightsAway, match="--disable-dynamic-vram"):
        ComfyUNet(model.model.diffusion_model).traceable(torch.bfloat16)


def for_a_thread(model):
    from livediffusion.compiled.engine import WeightsAway
    from livediffusion.host.models.unet import ComfyUNet

    with pytest.raises(WeightsAway, match="come page by page"):
        ComfyUNet(model.model.diffusion_model).copied()


def copied(model):
    from livediffusion.compiled import copies

    copies.copied(model.model.diffusion_model)
    copies.emptied(model.model)


@pytest.mark.parametrize(
    "copier", [counted, searched, reused, traced, for_a_thread, copied], ids=lambda f: f.__name__
)
def test_no_copy_owns_what_lies_on_a_paged_unet(lib, copier):
    import paging

    model, patcher = paged_unet()
    with paging.untouched(lib):
        copier(model)
    assert any(hasattr(part, "_v") for part in patcher.model.modules())


def test_the_double_sees_a_second_owner(lib):
    """The tests of this file are about something: what must not be done is seen."""
    import paging

    model, _ = paged_unet()
    with pytest.raises(AssertionError), paging.untouched(lib):
        copy.deepcopy(model.model.diffusion_model)
    assert {"a ModelVBAR was copied", "a HostBuffer was copied"} <= set(lib.wrong)
    assert paging.Pinned.copies


def test_patchwork_acts_on_a_paged_unet(lib):
    """On the same weights, loaded once more without pages, and once for all its settings."""
    import coherent
    import paging
    import pairs
    import tiny
    from livediffusion.engine.patchwork.mask import Patchwork
    from livediffusion.host.models.coherence import attach
    from livediffusion.host.sampling.stream import Stream

    own, loaded = paging.page(coherent.model().model), []
    with pytest.raises(ValueError, match=r"^model: .*--disable-dynamic-vram"):
        attach(own, patchwork=Patchwork())

    def load(disable_dynamic=False):
        assert disable_dynamic
        loaded.append(coherent.model())
        return loaded[-1]

    own.cached_patcher_init = load, ()
    clones = [attach(own, patchwork=Patchwork(grow=i)) for i in range(3)]
    assert len(loaded) == 1 and all(clone.model is loaded[0].model for clone in clones)
    assert own.is_dynamic() and not any(clone.is_dynamic() for clone in clones)
    clone = attach(own.clone(), patchwork=Patchwork())
    clone.load_device = torch.device("cpu")
    stream = Stream(1)
    for _ in range(6):
        out = stream.run(pairs.guider(clone), tiny.latents(1, 5, 16), pairs.settings())
    patching = stream.coherent.neighbours.patching
    assert out.isfinite().all() and patching.why == "" and patching.share < 1
    assert len(loaded) == 1 and lib.wrong == []
    network = weakref.ref(loaded.pop().model)
    del own, clones, clone, stream, out, patching, load
    gc.collect()
    assert network() is None, "it goes with the paged one"


def test_engines_load_a_paged_unet_once_more_and_no_oftener(lib):
    """A LoRA that is moved before Live Compile gives it another clone each time."""
    import coherent
    import paging
    from livediffusion.host.models.engines import fixed

    own, loaded = paging.page(coherent.model().model), []
    with pytest.raises(ValueError, match=r"^model: .*--disable-dynamic-vram"):
        fixed(own)

    def load(disable_dynamic=False):
        assert disable_dynamic
        loaded.append(coherent.model())
        return loaded[-1]

    own.cached_patcher_init = load, ()
    name = next(key for key in own.model_state_dict() if key.endswith("weight"))
    for i in range(3):
        moved = own.clone()
        moved.add_patches({name: (torch.ones(1),)}, 0.1 * i)
        clone = fixed(moved)
        assert not clone.is_dynamic() and clone.model is loaded[0].model
        assert clone.patches == moved.patches and clone.patches_uuid == moved.patches_uuid
    assert len(loaded) == 1 and own.is_dynamic() and lib.wrong == []


class Half:
    """Runs the copy that it is given, as a recording does: with the addresses that it was given."""

    name, precision, settled = "own", "default", True
    made = 0

    def prepare(self, network, x):
        Half.made += 1
        self.network, self.at = network.to(x.dtype), _addresses(network)
        assert not any("_v" in vars(p) or "_pin_state" in vars(p) for p in network.modules())

    def __call__(self, x):
        assert _addresses(self.network) == self.at
        return self.network(x)

    def release(self):
        self.network = None


def _addresses(network):
    return [weight.data_ptr() for weight in network.parameters()]


def test_a_compiled_vae_has_weights_that_stay(lib, monkeypatch):
    """Both halves; ComfyUI loads a paged VAE anew at every call, its small weights elsewhere."""
    import paging
    import tiny
    from livediffusion.host.frames import compiled_vae

    monkeypatch.setattr(Half, "made", 0)
    vae = paged_vae()
    image = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    latent = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = vae.first_stage_model.decode(latent), vae.first_stage_model.encode(image.movedim(3, 1))
    with paging.untouched(lib):
        own = compiled_vae.compiled(vae, Half, lambda text: None)
        stage = own.first_stage_model
        assert not own.patcher.is_dynamic() and own.patcher.model is stage.inner
        assert own.vae_dtype == next(stage.inner.parameters()).dtype
        for _ in range(4):
            vae.patcher.load(paging.DEVICE)
            assert tiny.rms(stage.decode(latent), wanted[0]) <= 1e-5
            assert tiny.rms(stage.encode(image.movedim(3, 1)), wanted[1]) <= 1e-5
        assert (stage.ran, stage.fell_back, Half.made) == (8, 0, 2)
        again = compiled_vae.without(own)
        assert again.patcher is vae.patcher and again.first_stage_model is vae.first_stage_model
        twice = compiled_vae.compiled(own, Half, lambda text: None)
        assert twice.first_stage_model.before == stage.before
        del own, stage, twice


def test_a_compiled_vae_is_made_once_through_comfyuis_own_calls(lib, monkeypatch):
    """Which load the VAE each time: a paged one's two small parameters are elsewhere then."""
    import paging
    from livediffusion.host.frames import compiled_vae

    def small(network):
        return [p.data_ptr() for p in network.parameters() if p.numel() * 4 <= 16 * 1024]

    monkeypatch.setattr(Half, "made", 0)
    vae = paged_vae()
    own = compiled_vae.compiled(vae, Half, lambda text: None)
    before = small(own.first_stage_model.inner)
    image = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        vae.patcher.load(paging.DEVICE)
        own.decode(own.encode(image))
    stage = own.first_stage_model
    assert (stage.ran, stage.fell_back, Half.made) == (8, 0, 2), stage.reason
    assert len(before) > 2 and small(stage.inner) == before
    del own, stage


def test_halves_copy_nothing_that_is_owned(lib):
    """Whoever gives them a paged network all the same."""
    import paging
    from livediffusion.host.frames import compiled_vae

    vae = paged_vae()
    stage = compiled_vae.CompiledStage(vae.first_stage_model, Half, print, (None, None))
    with paging.untouched(lib):
        stage.decode(torch.zeros(1, 4, 4, 4))
        assert stage.fell_back == 0, stage.reason
        del stage


class Owner:
    def __deepcopy__(self, memo):
        raise AssertionError("copied")

    __reduce_ex__ = __deepcopy__


class Part(nn.Module):
    """With all that a part may have on it."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.none = nn.Linear(3, 3), nn.Linear(3, 3), None
        self.two.weight = self.one.weight
        self.register_buffer("table", torch.arange(3))
        self.register_parameter("absent", None)
        self.owner, self.page = Owner(), (Owner(), 1, 2)
        self.plain = {"a": [1, "b"], "parts": [self.one], "owner": Owner()}
        self.call = functools.partial(self.one.forward)
        self.seen = []
        self.register_forward_hook(self.after)

    def after(self, part, args, out):
        self.seen.append(part)

    def forward(self, x):
        return self.two(self.call(x)) + self.table


def test_a_copy_is_made_of_its_own_parts_and_weights():
    from livediffusion.compiled.copies import copied

    with torch.inference_mode(False), torch.no_grad():
        part = nn.Sequential(Part())
        other = copied(part)
        one, two = part[0], other[0]
        assert torch.equal(part(torch.ones(1, 3)), other(torch.ones(1, 3)))
        assert [type(p) for p in part.modules()] == [type(p) for p in other.modules()]
        assert not {id(p) for p in part.modules()} & {id(p) for p in other.modules()}
        own = {t.data_ptr() for t in (*part.parameters(), *part.buffers())}
        assert not own & {t.data_ptr() for t in (*other.parameters(), *other.buffers())}
        assert two.two.weight is two.one.weight and two.two.weight.requires_grad
        assert two.owner is one.owner and two.page[0] is one.page[0]
        assert two.plain["parts"][0] is two.one and two.plain["owner"] is one.plain["owner"]
        assert two.plain["a"] is not one.plain["a"] and two.plain["a"] == one.plain["a"]
        assert two.call.func.__self__ is two.one
        assert one.seen == [one] and two.seen == [two]
        two.one.weight.fill_(0)
        assert not one.one.weight.eq(0).any()
