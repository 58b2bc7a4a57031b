"""One load in a process of its own: `python -m moebius.bench.load_once '{...}'` prints what it took as JSON.

Libraries are imported and the device is awake before the clock starts; it stops when every weight has arrived.
"""

import gc
import json
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moebius.layers.quantized import hold
from moebius.layers.quantizing import forms_for, segments_of
from moebius.quantization.config import QuantizationConfig
from moebius.quantization.decoding import quantize


class AnonymousPeak:
    """The most anonymous memory that the process held beyond what it held at the start, by 200 looks a second."""

    def __init__(self) -> None:
        self.start = self.peak = _anonymous()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return max(self.peak, _anonymous()) - self.start

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.peak = max(self.peak, _anonymous())


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "copied": {"mapping": "never"},
    "sync": {"mapping": "never", "loading": "sync"},
    "int4": {"quantization": "int4"},
    "int4 after": {"mapping": "never"},
}


def _open(way: str, folder: str, device: str, dtype: str) -> Any:
    # on the CPU both load without a device_map, for which transformers wants another library
    options: dict[str, Any] = {"dtype": dtype, **({} if device == "cpu" else {"device_map": device})}
    if way.startswith("moebius"):
        from moebius.auto import AutoModelForCausalLM

        _, _, how = way.partition(" ")
        load = partial(AutoModelForCausalLM.from_pretrained, folder, **options, **OPTIONS[how])
        return (lambda: _quantized(load())) if how == "int4 after" else load
    from transformers import AutoModelForCausalLM as Peer

    return partial(Peer.from_pretrained, folder, **options)


def _quantized(model: Any) -> Any:
    """Of a loaded model, weight by weight, each as a whole: what the stream spares."""
    config = QuantizationConfig(form="int4")
    for name, form in forms_for(model, config).items():
        values, scales = quantize(form, model.get_parameter(name).detach(), segments_of(name))
        hold(model, {name: form})
        model.get_parameter(name).data.copy_(values)
        model.get_parameter(f"{name}_scale").data.copy_(scales)
    return model


def measure(way: str, folder: str, device: str, dtype: str) -> dict[str, Any]:
    """way: "transformers" (its switch is an environment variable), or "moebius" and a name in OPTIONS."""
    load, cuda = _open(way, folder, device, dtype), device != "cpu"
    if cuda:
        torch.zeros(1, device=device)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    gc.collect()
    peak, begin = AnonymousPeak(), time.perf_counter()
    model = load()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    anonymous, begin = peak.stop(), time.perf_counter()
    checksum = sum(p.detach().view(-1)[::1024].float().sum().item() for p in model.parameters())  # touches every page
    report = {"seconds": seconds, "touch_seconds": time.perf_counter() - begin, "anonymous_bytes": anonymous}
    if cuda:
        report |= {"device_bytes": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return report | {"model_bytes": nbytes, "checksum": checksum}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
