"""SpoutGL and syphon-python as tests have them where they cannot run: doubles, same signatures.

What is called here is what the real packages have: SPOUT and SYPHON say so, and a test compares
them with the wheels where those are to be had (tests/live/test_adapters.py). The doubles do what
the packages' sources say: a picture read through Spout is one behind, what is drawn to Syphon is
BGRA with the bottom row first, and who has no OpenGL context in the thread that calls is told.
"""

import importlib.machinery
import inspect
import threading
import types

import numpy as np

SPOUT_VERSION, SYPHON_VERSION = "0.1.1", "0.1.1"
# SpoutGL's methods: what the Python name calls in Spout.dll, as the compiled module imports it. The
# letters after QEAA are what comes back and goes in (_N bool, H int, I unsigned, K unsigned long,
# J long, X nothing, PEBE bytes, PEBD text), so the number of arguments is in them.
SPOUT = {
    "SpoutSender": {
        "createOpenGL": "?CreateOpenGL@SpoutSender@@QEAA_NXZ",
        "closeOpenGL": "?CloseOpenGL@SpoutSender@@QEAA_NXZ",
        "setAutoShare": "?SetAutoShare@SpoutSender@@QEAAX_N@Z",
        "setSenderName": "?SetSenderName@SpoutSender@@QEAAXPEBD@Z",
        "sendImage": "?SendImage@SpoutSender@@QEAA_NPEBEIII_NI@Z",
        "releaseSender": "?ReleaseSender@SpoutSender@@QEAAXXZ",
    },
    "SpoutReceiver": {
        "createOpenGL": "?CreateOpenGL@SpoutReceiver@@QEAA_NXZ",
        "closeOpenGL": "?CloseOpenGL@SpoutReceiver@@QEAA_NXZ",
        "setAutoShare": "?SetAutoShare@SpoutReceiver@@QEAAX_N@Z",
        "setReceiverName": "?SetReceiverName@SpoutReceiver@@QEAAXPEBD@Z",
        # the module's own takes the buffer in place of a pointer
        "receiveImage": "?ReceiveImage@SpoutReceiver@@QEAA_NPEAEI_NI@Z",
        "isUpdated": "?IsUpdated@SpoutReceiver@@QEAA_NXZ",
        "isFrameNew": "?IsFrameNew@SpoutReceiver@@QEAA_NXZ",
        "getSenderFrame": "?GetSenderFrame@SpoutReceiver@@QEAAJXZ",
        "getSenderWidth": "?GetSenderWidth@SpoutReceiver@@QEAAIXZ",
        "getSenderHeight": "?GetSenderHeight@SpoutReceiver@@QEAAIXZ",
        "getSenderList": "?GetSenderList@SpoutReceiver@@QEAA?AV",
        "releaseReceiver": "?ReleaseReceiver@SpoutReceiver@@QEAAXXZ",
    },
}
# syphon-python's functions and methods by file, with their parameters; a property has None
SYPHON = {
    "server.py": {
        "SyphonMetalServer.__init__": ["name", "device", "command_queue"],
        "SyphonMetalServer.publish_frame_texture": [
            "texture", "region", "size", "is_flipped", "command_buffer", "auto_commit",
        ],
        "SyphonMetalServer.stop": [],
    },
    "client.py": {
        "SyphonMetalClient.__init__": ["description", "device"],
        "SyphonMetalClient.is_valid": None,
        "SyphonMetalClient.has_new_frame": None,
        "SyphonMetalClient.new_frame_image": None,
        "SyphonMetalClient.stop": [],
    },
    "server_directory.py": {
        "SyphonServerDirectory.__init__": [],
        "SyphonServerDirectory.servers": None,
    },
    "utils/raw.py": {"create_mtl_texture": ["device", "width", "height", "pixel_format"]},
    "utils/numpy.py": {
        "copy_image_to_mtl_texture": ["image", "texture"],
        "copy_mtl_texture_to_image": ["texture"],
    },
}  # fmt: skip


def module(name, **parts):
    """Something that can be put where an imported package is looked for."""
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(made).update(parts)
    return made


class _Context:
    """What has to be made, used and closed in one thread."""

    open = 0

    def __init__(self):
        self._thread = None

    def createOpenGL(self):
        assert self._thread is None
        self._thread = threading.current_thread()
        _Context.open += 1
        return True

    def closeOpenGL(self):
        self._here()
        self._thread = None
        _Context.open -= 1
        return True

    def setAutoShare(self, on):
        assert on is True

    def _here(self):
        assert self._thread is threading.current_thread(), "OpenGL's context is another thread's"


def spout():
    """The module SpoutGL. Attributes of it: `senders`, by name a list [picture, number]."""
    senders = {}

    class SpoutSender(_Context):
        def setSenderName(self, name):
            self._name = name

        def sendImage(self, pixels, width, height, form, invert, fbo):
            self._here()
            assert form == 0x1908 and invert is False and fbo == 0
            assert pixels.flags.c_contiguous and pixels.nbytes == width * height * 4
            number = senders.get(self._name, (None, 0))[1]
            senders[self._name] = pixels.reshape(height, width, 4).copy(), number + 1
            return True

        def releaseSender(self):
            self._here()
            senders.pop(self._name, None)

    class SpoutReceiver(_Context):
        def __init__(self):
            super().__init__()
            self._size, self._behind, self._seen = None, None, 0
            self._updated = self._new = False

        def getSenderList(self):
            return list(senders)

        def setReceiverName(self, name):
            self._name = name

        def receiveImage(self, pixels, form, invert, fbo):
            self._here()
            assert form == 0x1908 and invert is False and fbo == 0
            if self._updated:
                return True
            if self._name not in senders:
                self._size = None
                return False
            picture, number = senders[self._name]
            if self._size != picture.shape[:2]:
                self._size, self._updated, self._behind = picture.shape[:2], True, None
                return True
            assert pixels.shape == picture.shape and pixels.flags.c_contiguous
            self._new = number != self._seen
            if self._new:
                self._seen = number
                if self._behind is not None:
                    pixels[...] = self._behind
                self._behind = picture
            return True

        def isUpdated(self):
            was, self._updated = self._updated, False
            return was

        def isFrameNew(self):
            return self._new

        def getSenderFrame(self):
            return self._seen

        def getSenderWidth(self):
            return self._size[1]

        def getSenderHeight(self):
            return self._size[0]

        def releaseReceiver(self):
            self._here()

    return module("SpoutGL", SpoutSender=SpoutSender, SpoutReceiver=SpoutReceiver, senders=senders)


class _Texture:
    def __init__(self, width, height):
        self.pixels = np.zeros((height, width, 4), np.uint8)


class Syphon:
    """The modules of syphon-python, and those of PyObjC that are used.

    Attributes:
        modules: by the name that is imported.
        heard: whether the main thread turned its run loop, without which nobody is found.
        servers: those that run.
        pools: how many pools are open.
    """

    def __init__(self):
        self.heard, self.pools, self.servers = False, 0, {}
        utils = module("syphon.utils", raw=self._raw(), numpy=self._numpy())
        syphon = module("syphon", utils=utils, **self._classes())
        self.modules = {
            "syphon": syphon, "syphon.utils": utils, "syphon.utils.raw": utils.raw,
            "syphon.utils.numpy": utils.numpy, "objc": module("objc", autorelease_pool=self._pool),
            "Cocoa": self._cocoa(),
        }  # fmt: skip

    def _pool(self):
        double = self

        class Pool:
            def __enter__(self):
                double.pools += 1

            def __exit__(self, *error):
                double.pools -= 1

        return Pool()

    def _cocoa(self):
        def turn(mode, until):
            assert threading.current_thread() is threading.main_thread()
            self.heard = True

        loop = types.SimpleNamespace(runMode_beforeDate_=turn)
        return module(
            "Cocoa",
            NSDate=types.SimpleNamespace(date=lambda: 0.0),
            NSDefaultRunLoopMode="default",
            NSRunLoop=types.SimpleNamespace(currentRunLoop=lambda: loop),
        )

    def _raw(self):
        def create_mtl_texture(device, width, height, pixel_format="RGBA8Unorm"):
            return _Texture(width, height)

        return module("syphon.utils.raw", create_mtl_texture=create_mtl_texture)

    def _numpy(self):
        def copy_image_to_mtl_texture(image, texture):
            assert len(image.shape) == 3 and image.shape[2] == 4
            assert image.shape == texture.pixels.shape and image.dtype == np.uint8
            texture.pixels[...] = image

        def copy_mtl_texture_to_image(texture):
            return texture.pixels.copy()

        return module(
            "syphon.utils.numpy",
            copy_image_to_mtl_texture=copy_image_to_mtl_texture,
            copy_mtl_texture_to_image=copy_mtl_texture_to_image,
        )

    def _classes(self):
        double = self

        class SyphonMetalServer:
            def __init__(self, name, device=None, command_queue=None):
                self.name, self.app_name, self.device, self.context = name, "python", object(), self
                self.surface, self.number = None, 0
                double.servers[id(self)] = self

            def publish_frame_texture(
                self, texture, region=None, size=None, is_flipped=False,
                command_buffer=None, auto_commit=True,
            ):  # fmt: skip
                pixels = texture.pixels[::-1] if is_flipped else texture.pixels
                surface = _Texture(pixels.shape[1], pixels.shape[0])
                surface.pixels[...] = pixels[..., [2, 1, 0, 3]]
                self.surface, self.number = surface, self.number + 1

            def stop(self):
                del double.servers[id(self)]

        class SyphonServerDirectory:
            def __init__(self):
                self.run_loop_interval = 1.0

            @property
            def servers(self):
                return list(double.servers.values()) if double.heard else []

        class SyphonMetalClient:
            def __init__(self, description, device=None):
                self._server, self._seen = description, 0

            @property
            def is_valid(self):
                return id(self._server) in double.servers

            @property
            def has_new_frame(self):
                return self._server.number != self._seen

            @property
            def new_frame_image(self):
                self._seen = self._server.number
                return self._server.surface

            def stop(self):
                self._server = None

        return {
            made.__name__: made
            for made in (SyphonMetalServer, SyphonServerDirectory, SyphonMetalClient)
        }


def parameters(made):
    """Names of what a function takes, without self; None of a property."""
    if isinstance(made, property):
        return None
    return [name for name in inspect.signature(made).parameters if name != "self"]
