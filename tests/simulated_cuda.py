"""A GPU for machines without one: tensors that say they are on cuda:0 and are computed on the CPU.

As on a GPU, operands on different devices raise, and so do kernels that CUDA lacks. Beyond a GPU, a stream that uses a
tensor of another stream without having waited for it raises, and what is copied to pinned memory arrives only when the
host has waited for it. Kernels, copies and waits are counted. `Gpu.kernel` and `Gpu.copy` take time on the current
stream without computing anything, for tests of what overlaps.
"""

import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedModel

DEVICE = torch.device("cuda:0")
aten: Any = torch.ops.aten
_IMPLICIT: Any = torch._C.DispatchKey.CompositeImplicitAutograd


class DeviceMismatchError(RuntimeError):
    """A kernel was called on tensors of different devices, or on types that it lacks on CUDA."""


class RaceError(RuntimeError):
    """A stream used a tensor of another stream without waiting for it."""


class Stream:
    """Kernels and copies in order. `now` counts them; `seen` is how far it has waited for each other stream."""

    def __init__(self, gpu: "Gpu") -> None:
        self.gpu = gpu
        self.now = 0
        self.seen: dict[Stream, int] = {}
        self.busy_until = 0.0  # on the clock of time.monotonic
        self.arrivals: list[tuple[int, Callable[[], object]]] = []  # copies to pinned memory, by `now`

    def take(self, seconds: float) -> None:
        """Be busy for `seconds` after what was submitted before."""
        begin = max(time.monotonic(), self.busy_until)
        self.busy_until = begin + seconds
        if seconds and self is self.gpu.main:
            self.gpu.spans.append((begin, self.busy_until))

    def record_event(self) -> "Event":
        event = Event(self.gpu)
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        for stream, until in event.seen.items():
            self.seen[stream] = max(until, self.seen.get(stream, 0))
        self.busy_until = max(self.busy_until, event.time)

    def synchronize(self) -> None:
        self.gpu.stats["synchronizations"] += 1
        self.record_event()._reach()


class Event:
    """A point in a stream."""

    def __init__(self, gpu: "Gpu", enable_timing: bool = False, blocking: bool = False) -> None:
        self.gpu = gpu
        self.has_timing = enable_timing
        self.seen: dict[Stream, int] = {}
        self.time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        stream = self.gpu.current_stream() if stream is None else stream
        self.seen = {**stream.seen, stream: stream.now}
        self.time = max(time.monotonic(), stream.busy_until)
        self.stream = stream

    def synchronize(self) -> None:
        self.gpu.stats["waits for events"] += 1
        self._reach()

    def _reach(self) -> None:
        time.sleep(max(0.0, self.time - time.monotonic()))
        if self.gpu.error is not None:
            raise self.gpu.error
        with self.gpu.lock:
            for stream, until in self.seen.items():
                self.gpu.host_seen[stream] = max(until, self.gpu.host_seen.get(stream, 0))
            arrived = [arrive for until, arrive in self.stream.arrivals if until <= self.seen[self.stream]]
            self.stream.arrivals = [copy for copy in self.stream.arrivals if copy[0] > self.seen[self.stream]]
        for arrive in arrived:
            arrive()

    def elapsed_time(self, end: "Event") -> float:
        assert self.has_timing
        assert end.time <= time.monotonic(), "not reached yet"
        return 1000 * (end.time - self.time)


class Gpu:
    """The simulated device and its counts."""

    def __init__(self) -> None:
        self.stats = Counter[str]()
        self.sites: dict[str, Counter[str]] = {}  # lines of mmbeam that copied from pageable memory or waited
        self.lock = threading.RLock()
        self.error: Exception | None = None  # raised by the next wait, as CUDA reports asynchronous errors
        self.spans: list[tuple[float, float]] = []  # in which the main stream was busy
        self.host_seen: dict[Stream, int] = {}
        self.pinned: dict[int, torch.Tensor] = {}  # by address; kept, so that no address is reused
        self.main = Stream(self)
        self._local = threading.local()

    def current_stream(self, device: object = None) -> Stream:
        return getattr(self._local, "stream", self.main)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._local.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._local.stream = before

    @contextmanager
    def device(self, device: object = None) -> Iterator[None]:
        """Make factory functions with a device of this thread return simulated tensors."""
        with _Mode(self):
            yield

    def kernel(self, seconds: float) -> None:
        """Run a kernel that takes `seconds`."""
        self.stats["kernels"] += 1
        self.current_stream().take(seconds)

    copy = kernel

    @property
    def idle_share(self) -> float:
        """The share of the time between the first and the last kernel in which the main stream had nothing to do."""
        busy = sum(end - begin for begin, end in self.spans)
        return 1 - busy / (self.spans[-1][1] - self.spans[0][0])

    def count(self, what: str) -> None:
        """Count something that no step should do, with the line of mmbeam that does it."""
        self.stats[what] += 1
        lines: dict[str, str] = {}
        for frame in traceback.extract_stack():
            for package in ("mmbeam", "transformers"):
                _, inside, path = frame.filename.rpartition(f"/{package}/")
                if inside:
                    lines[package] = f"{path}:{frame.lineno}"
        self.sites.setdefault(what, Counter())[" ".join(lines.values())] += 1

    def use(self, tensors: Sequence["Tensor"]) -> None:
        """Count a kernel of the current stream. Raises RaceError if it may not use one of its tensors yet."""
        stream = self.current_stream()
        for tensor in tensors:
            known = max(stream.seen.get(tensor.stream, 0), self.host_seen.get(tensor.stream, 0))
            if tensor.stream is not stream and tensor.made > known:
                raise RaceError(f"a tensor {tuple(tensor.shape)} of another stream, used before it is complete")
        with self.lock:
            stream.now += 1


class Tensor(torch.Tensor):
    """A tensor on the simulated device; `host` holds its numbers."""

    host: torch.Tensor
    gpu: Gpu
    stream: Stream
    made: int  # `now` of its stream

    @staticmethod
    def __new__(cls, host: torch.Tensor, gpu: Gpu) -> "Tensor":
        options = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        made: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, host.size(), layout=host.layout, device="meta", requires_grad=False, **options
        )
        made.host, made.gpu, made.stream, made.made = host, gpu, gpu.current_stream(), gpu.current_stream().now
        return made  # type: ignore[no-any-return]

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return super().__getitem__(self._indices(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(self._indices(index), value)

    def _indices(self, index: Any) -> Any:
        """Return the index with lists as tensors on the device: torch would create them on the meta device."""
        parts = tuple(
            torch.tensor(part, device=DEVICE) if isinstance(part, list) else part
            for part in (index if isinstance(index, tuple) else (index,))
        )
        return parts if isinstance(index, tuple) else parts[0]

    def new_tensor(self, data: Any, **options: Any) -> torch.Tensor:
        return torch.tensor(data, dtype=options.get("dtype", self.dtype), device=options.get("device", DEVICE))

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"simulated {self.host}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, Tensor)]
        return _dispatch(tensors[0].gpu, func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(self.gpu, func, args, kwargs or {})


# Operators whose first argument may be on the device while tensors without dimensions are on the host.
_SCALAR_ARGUMENTS = {
    "masked_fill",
    "where",
    "fill",
    "pow",
    "clamp",
    "lift_fresh",
    "lift_fresh_copy",
    "addcmul",
    "addcdiv",
}
_INDEXING = {"index", "index_put", "_index_put_impl", "_unsafe_index"}
_NO_UINT8 = {"_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa"}
_NO_INTEGERS = {"mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot"}
_READ_SIZES = {"nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "repeat_interleave"}
_NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "alias",
}


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


def _dispatch(gpu: Gpu, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.split("::")[1]
    plain = name.rstrip("_")
    if name == "_has_compatible_shallow_copy_type":
        return False
    if func.has_kernel_for_dispatch_key(_IMPLICIT):
        with _Mode(gpu):
            return func.decompose(*args, **kwargs)
    tensors = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    others = [tensor for tensor in tensors if not isinstance(tensor, Tensor)]
    is_pinned = bool(kwargs.pop("pin_memory", False))

    def unwrap(item: Any) -> Any:
        if isinstance(item, Tensor):
            return item.host
        return torch.device("cpu") if isinstance(item, torch.device) and _is_cuda(item) else item

    def call() -> Any:
        return func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))

    if name == "is_pinned":
        return _is_pinned(gpu, args[0])
    if name == "_to_copy":
        return _move(gpu, args[0], call(), kwargs, bool(kwargs.get("non_blocking")))
    if name == "copy_":
        target, source = args[0], args[1]
        is_async = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        return _copy_into(gpu, target, source, is_async)
    if name == "_local_scalar_dense" and ours:
        gpu.count("item() waits")
        return call()
    if name == "_fused_sdp_choice":
        return 0
    _check(gpu, func, plain, args, kwargs, ours, others)
    on_cuda = bool(ours) or _is_cuda(kwargs.get("device"))
    is_mask = any(
        isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in _indices(args)
    )
    fills = plain in ("index_put", "_index_put_impl") and args[2].numel() == 1  # CUDA calls masked_fill then
    if ours and (name in _READ_SIZES or (plain in _INDEXING and is_mask and not fills)):
        gpu.count("waits for sizes")
    if plain in _NO_UINT8 and ours and ours[0].dtype in (torch.bfloat16, torch.float16):  # the CPU lacks these kernels
        out = func(args[0].host.float(), *args[1:], **kwargs).to(ours[0].dtype)
    else:
        out = call()
    if is_pinned and isinstance(out, torch.Tensor):
        gpu.pinned[out.untyped_storage().data_ptr()] = out
    if not on_cuda:
        return out
    returns = func._schema.returns
    is_view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
    if not is_view and plain not in _NO_KERNEL:
        gpu.stats["kernels"] += 1
        gpu.use(ours)
    by_host = {id(tensor.host): tensor for tensor in ours}

    def wrap(item: Any) -> Any:
        if not isinstance(item, torch.Tensor) or isinstance(item, Tensor):
            return item
        if id(item) in by_host:
            return by_host[id(item)]
        made = Tensor(item, gpu)
        if is_view:
            made.stream, made.made = ours[0].stream, ours[0].made
        return made

    return tree_map(wrap, out)


def _indices(args: Any) -> Sequence[Any]:
    return args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()


def _is_pinned(gpu: Gpu, tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() in gpu.pinned


def _move(gpu: Gpu, source: torch.Tensor, out: torch.Tensor, kwargs: dict[str, Any], is_async: bool) -> torch.Tensor:
    """Return what `_to_copy` of `source` returns; `out` holds its numbers."""
    was_ours = isinstance(source, Tensor)
    target = kwargs.get("device")
    is_ours = was_ours if target is None else _is_cuda(target)
    if was_ours:
        gpu.use([source])  # type: ignore[list-item]
    if was_ours and not is_ours:
        gpu.count("copies to pageable memory")
        return out
    if is_ours and not was_ours:
        gpu.use([])
        if is_async and _is_pinned(gpu, source):
            gpu.stats["copies to the device"] += 1
        else:
            gpu.count("copies from pageable memory")
    elif is_ours:
        gpu.stats["kernels"] += 1
    return Tensor(out.clone() if out is source else out, gpu) if is_ours else out


def _copy_into(gpu: Gpu, target: torch.Tensor, source: torch.Tensor, is_async: bool) -> torch.Tensor:
    numbers = source.host if isinstance(source, Tensor) else source
    if isinstance(target, Tensor):
        gpu.use([tensor for tensor in (target, source) if isinstance(tensor, Tensor)])
        if isinstance(source, Tensor):
            gpu.stats["kernels"] += 1
        elif is_async and _is_pinned(gpu, source):
            gpu.stats["copies to the device"] += 1
        else:
            gpu.count("copies from pageable memory")
        target.host.copy_(numbers)
    elif isinstance(source, Tensor) and is_async and _is_pinned(gpu, target):
        gpu.use([source])
        gpu.stats["copies to the host"] += 1
        kept, stream = numbers.clone(), gpu.current_stream()
        target.view(torch.uint8).fill_(0x7F) if target.dim() else None  # until it arrives
        stream.arrivals.append((stream.now, partial(target.copy_, kept)))
    else:
        if isinstance(source, Tensor):
            gpu.use([source])
            gpu.count("copies to pageable memory")
        target.copy_(numbers)
    return target


def _check(
    gpu: Gpu,
    func: Any,
    plain: str,
    args: Any,
    kwargs: dict[str, Any],
    ours: Sequence[Any],
    others: Sequence[Any],
) -> None:
    """Raise DeviceMismatchError for what raises on a GPU."""
    if not ours:
        return
    for tensor in others:
        is_operand = torch.Tag.pointwise in func.tags or plain in _SCALAR_ARGUMENTS or plain in _INDEXING
        if tensor.dim() == 0 and (is_operand or plain.startswith("_foreach")):
            continue
        if plain in _INDEXING and isinstance(args[0], Tensor) and any(tensor is index for index in _indices(args)):
            gpu.count("copies from pageable memory")
            continue
        raise DeviceMismatchError(f"{func}: a tensor {tuple(tensor.shape)} on the CPU, others on {DEVICE}")
    if plain in _NO_UINT8 and ours[0].dtype == torch.uint8:
        raise DeviceMismatchError(f"{func}: no kernel for uint8")
    if plain in _NO_INTEGERS and not (ours[0].dtype.is_floating_point or ours[0].dtype.is_complex):
        raise DeviceMismatchError(f"{func}: no kernel for integers")
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != "cuda":
        raise DeviceMismatchError(f"{func}: a generator on {generator.device}")


@contextmanager
def simulated_gpu() -> Iterator[Gpu]:
    """Make torch believe that the machine has one GPU, this one."""
    _forget_constants()
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield _install(monkeypatch)
    _forget_constants()


def _forget_constants() -> None:
    """Empty the caches of constants on a device, such as filters."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mmbeam.ops."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def _install(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    cuda: dict[str, Any] = {
        "Stream": lambda device=None: Stream(gpu),
        "Event": lambda enable_timing=False, blocking=False: Event(gpu, enable_timing, blocking),
        "stream": gpu.stream,
        "device": gpu.device,
        "current_stream": gpu.current_stream,
        "synchronize": lambda device=None: gpu.main.synchronize(),
        "empty_cache": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_, **__: (9, 0),
        "_lazy_init": lambda: None,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    assert overwrites is False
    _without_inference_mode(monkeypatch)
    make, attend = torch.tensor, torch.nn.functional.scaled_dot_product_attention

    def tensor(data: Any, *, dtype: Any = None, device: Any = None, pin_memory: bool = False, **options: Any) -> Any:
        if isinstance(data, list | tuple) and any(isinstance(item, Tensor) for item in data):
            data = [item.item() if isinstance(item, torch.Tensor) else item for item in data]
        if isinstance(data, Tensor):
            return data.clone().to(dtype=dtype)
        made = make(data, dtype=dtype, **options)
        return made.to(device) if device is not None else made

    def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Any:
        if isinstance(data, torch.Tensor):
            return data.to(device=data.device if device is None else device, dtype=dtype or data.dtype)
        return tensor(data, dtype=dtype, device=device)

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *options: Any, **named: Any) -> Any:
        present = [item for item in (query, key, value, attn_mask) if item is not None]
        ours = [item for item in present if isinstance(item, Tensor)]
        if not ours:
            return attend(query, key, value, attn_mask, *options, **named)
        if len(ours) != len(present):
            raise DeviceMismatchError("attention: tensors of different devices")
        gpu.stats["kernels"] += 1
        gpu.use(ours)
        hosts = [None if item is None else item.host for item in (query, key, value, attn_mask)]
        with torch.utils._python_dispatch._disable_current_modes():
            return Tensor(attend(*hosts, *options, **named), gpu)

    load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: Any, *args: Any, **options: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():  # it loads to the CPU, through the meta device
            return load(cls, *args, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    return gpu


def _without_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let inference mode only switch gradients off: views of wrapped tensors need version counters."""
    modes = threading.local()

    def enter(self: Any) -> None:
        modes.stack = [*getattr(modes, "stack", []), torch.no_grad() if self.mode else torch.enable_grad()]
        modes.stack[-1].__enter__()

    def leave(self: Any, *error: Any) -> None:
        modes.stack.pop().__exit__(*error)

    monkeypatch.setattr(torch.inference_mode, "__enter__", enter)
    monkeypatch.setattr(torch.inference_mode, "__exit__", leave)
