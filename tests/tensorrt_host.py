"""Where there is no NVIDIA driver: import Torch-TensorRT and run what of its compiler needs no device.

Torch-TensorRT asks for a GPU while it is imported, puts constants on it while it lowers, and deserialises each engine it has
built. Nothing of that is needed to lower, to partition, to convert, or to build a TensorRT-RTX engine, which is compiled for the
device only when it is loaded. `on_the_host` answers those three questions with the processor, so that the library's own code
runs. An engine cannot be executed, loaded or refitted here, and nothing pretends that it could be.
"""
import importlib
import os
import sys
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch

RUNTIMES = ("libtorchtrt.so", "libtorchtrt_runtime.so")    # linked against the CUDA build of PyTorch


@contextmanager
def driverless():
    "Answer the questions about the device that are asked at import and when defaults are made."
    with mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (0, 0)), \
         mock.patch.object(torch.cuda, "current_device", lambda: 0), \
         mock.patch.object(torch.cuda, "mem_get_info", lambda *_: (2**40, 2**40)):
        yield


def import_on_the_host():
    "Import torch_tensorrt; a CPU build of PyTorch cannot load its C++ runtime, so that one is not looked for."
    if "torch_tensorrt" in sys.modules or torch.cuda.is_available():
        return importlib.import_module("torch_tensorrt")
    is_file = os.path.isfile
    with driverless(), mock.patch("os.path.isfile", lambda path: os.path.basename(path) not in RUNTIMES and is_file(path)):
        if not hasattr(torch._C, "_CudaDeviceProperties"):    # the CPU build lacks a type that an annotation names
            torch._C._CudaDeviceProperties = object
        return importlib.import_module("torch_tensorrt")


class Unloaded:
    "The bytes of an engine that was built and not deserialised."

    def __init__(self, data):
        self.data = data

    def serialize(self):
        return self.data

    def get_aliased_input_tensor(self, name):
        return None


class Tensorrt:
    "The module tensorrt, whose runtime leaves the bytes of an engine as they are."

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        return getattr(self.module, name)

    def Runtime(self, logger):
        return SimpleNamespace(deserialize_cuda_engine=Unloaded)


@contextmanager
def on_the_host():
    "Lower, partition and build on the processor inside the block; does nothing where there is a GPU."
    library = import_on_the_host()
    if torch.cuda.is_available():
        yield library
        return
    utils = importlib.import_module("torch_tensorrt.dynamo.utils")
    interpreter = importlib.import_module("torch_tensorrt.dynamo.conversion._TRTInterpreter")
    runtime = importlib.import_module("torch_tensorrt.dynamo.runtime")
    to_device = utils.to_torch_device
    users = [module for name, module in list(sys.modules.items())
             if name.startswith("torch_tensorrt") and vars(module).get("to_torch_device") is to_device]
    with ExitStack() as stack:
        stack.enter_context(driverless())
        stack.enter_context(mock.patch.object(interpreter, "trt", Tensorrt(interpreter.trt)))
        stack.enter_context(mock.patch.object(runtime.TorchTensorRTModule, "setup_engine", lambda module: None))
        for module in users:
            stack.enter_context(mock.patch.object(module, "to_torch_device", lambda device: torch.device("cpu")))
        yield library
