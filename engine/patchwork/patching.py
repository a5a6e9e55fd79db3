"""One stream's kept features, and which tiles of which rows are computed anew."""

from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .kept import MOST, Full, Kept
from .mask import SIDE, Patchwork, changed, spread
from .tiles import Tiles

PLACES = 64  # rows that are known at a time
_ASKED = "timesteps", "context", "y"
_APART = 4.0  # see Patchwork.astray


class Network(Protocol):
    """A network that can be run on tiles.

    Attributes:
        step: latents' sides have to be multiples of it, and of SIDE.
    """

    step: int

    def whole(
        self, kept: Kept, at: Tensor, x: Tensor, timesteps: Tensor, context: Tensor,
        y: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Its output for rows, [R, C', H, W]; what tiles will need of them is kept at `at`, int64
        [R]."""

    def some(self, kept: Kept, tiles: Tiles, x: Tensor) -> Tensor:
        """Its output for tiles of rows x [R, C, H, W], [N, C']; what is kept of them is renewed.
        Timestep, prompt and statistics are those of the last whole pass."""


class Store:
    """What is kept of rows whose calls are of one form: all that their network is given has the
    same shapes.

    Attributes:
        places: of spots, in `kept`.
        known: places whose features are of a frame.
        owed: by how much, and for how long, places have been astray.
    """

    def __init__(self) -> None:
        self.kept = Kept()
        self.places: dict[Hashable, int] = {}
        self.known: set[int] = set()
        self.owed: dict[int, float] = {}


class Patching:
    """Of one stream. One stream, one thread.

    Calls of a tick may differ in form (prompts of unequal lengths): each has a store of its own.

    Attributes:
        settings: what is asked for.
        why: the newest call was computed as it is; empty where it was not.
        off: why all calls are, if they are.
        key: see `settle`.
    """

    def __init__(self, device: torch.device):
        self.device, self.settings = device, Patchwork()
        self.why = self.off = ""
        self.key: Hashable = None
        self._clear()

    def _clear(self) -> None:
        self._full = False
        self._stores: dict[Hashable, Store] = {}  # by the form of a call
        self._form: dict[Hashable, Hashable] = {}  # that each spot's newest call had
        self._ran = [0.0, 0.0]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(store.kept.size for store in self._stores.values())

    def settle(self, settings: Patchwork, key: Hashable, off: str = "") -> None:
        """What holds from now on.

        Args:
            off: see above.
            key: whatever nothing that is kept survives a change of: weights, size, dtype.
        """
        self.settings, self.off = settings, off
        if key != self.key:
            self.key = key
            self._clear()

    def forget(self) -> None:
        """What comes next has nothing to do with what is kept."""
        for store in self._stores.values():
            store.known.clear()

    @property
    def share(self) -> float:
        """Of the tiles that ran since `looked`, 0 to 1."""
        rows, ran = self._ran
        return ran / rows if rows else 1.0

    def looked(self) -> float:
        """The share, which is counted anew from now on."""
        share, self._ran = self.share, [0.0, 0.0]
        return share

    def skipped(self, why: str, rows: int) -> None:
        """A call is made as it is."""
        self.why = why
        self._ran[0] += rows
        self._ran[1] += rows

    def call(
        self, network: Network, spots: Sequence[Hashable], x: Tensor, timesteps: Tensor,
        context: Tensor, y: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """The network's output, [R, C', H, W]; None, and why, where the call is to be made as it
        is.

        Args:
            spots: what each row is to the stream; a row goes on with what was kept of its own.
            x: [R, C, H, W]; timesteps [R]; context [R or 1, T, D]; y [R or 1, E].
        """
        rows, self.why = x.shape[0], ""
        step = max(SIDE, network.step)
        if any(side % step for side in x.shape[-2:]):
            self.skipped(f"the latent's sides are no multiples of {step}", rows)
            return None
        whys = {
            f"more than {MOST >> 30} GB would have to be kept": self._full,
            f"a call has more than {PLACES} rows": rows > PLACES,
            "rows of a call have the same place": len(set(spots)) < rows,
        }
        if why := next((why for why, holds in whys.items() if holds), ""):
            self.skipped(why, rows)
            return None
        asked = [timesteps, context.expand(rows, -1, -1)]
        asked += [] if y is None else [y.expand(rows, -1)]
        try:
            return self._fitting(network, spots, x, asked)
        except Full:
            self._clear()
            self._full = True
            self.skipped(f"more than {MOST >> 30} GB would have to be kept", rows)
            return None
        except BaseException:
            # it may be half written
            self.forget()
            raise

    def _fitting(
        self, network: Network, spots: Sequence[Hashable], x: Tensor, asked: list[Tensor]
    ) -> Tensor | None:
        """The call; what spots have left behind in other forms makes room where there is none.

        Raises:
            Full: even so.
        """
        try:
            return self._call(network, spots, x, asked)
        except Full:
            if not any(
                self._form[spot] != form
                for form, store in self._stores.items()
                for spot in store.places
            ):
                raise
        self._clear()
        return self._call(network, spots, x, asked)

    def _call(
        self, network: Network, spots: Sequence[Hashable], x: Tensor, asked: list[Tensor]
    ) -> Tensor | None:
        rows, form = x.shape[0], tuple((t.shape[1:], t.dtype) for t in (x, *asked))
        store = self._store(form, spots)
        kept, places = store.kept, [store.places[spot] for spot in spots]
        at = torch.tensor(places, device=x.device)
        before = kept.room("x", x.shape[1:], x)
        same = torch.ones(rows, dtype=torch.bool, device=x.device)
        for name, value in zip(_ASKED, asked, strict=False):
            had = kept.room(name, value.shape[1:], value).index_select(0, at)
            same &= (had == value).flatten(1).all(1) if value.ndim > 1 else had == value
        had = before.index_select(0, at)
        mask = changed(x, had, self.settings)
        first = kept.room("whole", x.shape[1:], x).index_select(0, at)
        shares = [
            tiles.flatten(1).float().mean(1)
            for tiles in (mask, changed(had, first, self.settings))
        ]
        # squared once more: what moves about is little apart, another scene is much
        apart = (had - first).float().square().flatten(1).mean(1).square()
        told = [same, x.flatten(1).isfinite().all(1), *shares, apart]
        stands, finite, share, stale, apart = torch.stack([t.float() for t in told]).tolist()
        if not all(finite):
            self.skipped("a frame is not finite", rows)
            return None
        astray = [s + _APART * a for s, a in zip(stale, apart, strict=True)]
        renewed = self._renewed(store, places, astray)
        whole, some = [], []
        for r, place in enumerate(places):
            known = place in store.known and stands[r] and place != renewed
            if not known or max(share[r], stale[r]) > self.settings.most:
                whole.append(r)
            elif share[r]:
                some.append(r)
        # what breaks off on the way has left these half written
        store.known.difference_update(places[r] for r in whole)
        out = None
        if whole:
            index = torch.tensor(whole, device=x.device)
            args = [t.index_select(0, index) for t in (x, *asked)]
            own = at.index_select(0, index)
            out = network.whole(kept, own, *args, *[None] * (4 - len(args)))
            _out(kept, out).index_copy_(0, own, out.permute(0, 2, 3, 1))
            for name, value in zip(("x", *_ASKED), args, strict=False):
                kept[name].index_copy_(0, own, value)
            kept["whole"].index_copy_(0, own, args[0])
            for r in whole:
                store.owed.pop(places[r], None)
            fine = out.flatten(1).isfinite().all(1).tolist()
            store.known.update(places[r] for r, good in zip(whole, fine, strict=True) if good)
        if some:
            index = torch.tensor(some, device=x.device)
            self._some(network, kept, *[t.index_select(0, index) for t in (at, x, mask)])
        self._ran[0] += rows
        self._ran[1] += len(whole) + sum(share[r] for r in some)
        if len(whole) == rows:
            return out
        return kept["out"].index_select(0, at).permute(0, 3, 1, 2)

    def _renewed(self, store: Store, places: list[int], astray: list[float]) -> int | None:
        """The place whose statistics are made anew in this call, if one is due: never two, so that
        no tick is much longer than others.

        Args:
            astray: how far each is from its last whole pass.
        """
        for place, far in zip(places, astray, strict=True):
            store.owed[place] = store.owed.get(place, 0.0) + far
        most = max(places, key=store.owed.__getitem__)
        return most if store.owed[most] >= self.settings.astray else None

    def _some(self, network: Network, kept: Kept, at: Tensor, x: Tensor, mask: Tensor) -> None:
        """Tiles of rows anew."""
        before = kept["x"]
        new = torch.where(spread(mask), x, before.index_select(0, at))
        before.index_copy_(0, at, new)
        tiles = Tiles(mask, at, SIDE)
        out = network.some(kept, tiles, x)
        had = kept["out"]
        had.view(-1, had.shape[-1]).index_copy_(0, tiles.tokens, out)
        if not out.isfinite().all():
            self.forget()

    def _store(self, form: Hashable, spots: Sequence[Hashable]) -> Store:
        """Of a form, with places for these spots."""
        store = self._stores.get(form, Store())
        fresh = sum(spot not in store.places for spot in spots)
        if sum(len(known.places) for known in self._stores.values()) + fresh > PLACES:
            # what is not asked any more (another number of steps) makes room
            self._clear()
        self._form.update(dict.fromkeys(spots, form))
        left = set(self._form.values())
        self._stores = {of: known for of, known in self._stores.items() if of in left}
        store = self._stores.setdefault(form, Store())
        store.kept.beside = self.size - store.kept.size
        fresh = [spot for spot in spots if spot not in store.places]
        store.kept.grow(len(store.places) + len(fresh))
        for spot in fresh:
            store.places[spot] = len(store.places)
        return store


def _out(kept: Kept, like: Tensor) -> Tensor:
    """Outputs by position, [P, H, W, C']."""
    _, channels, height, width = like.shape
    return kept.room("out", (height, width, channels), like)
