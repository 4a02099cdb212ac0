"""The engine: admits requests, forms batches, runs the model, samples, hands out tokens.

There is no background thread. Whoever waits for a request drives the engine; callers in several
threads share its steps, so their requests run as one batch. A request's tokens depend on its own
prompt, parameters and seed alone, and so does its failure.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence

import torch

from internvl_rt.models.internvl import InternVL
from internvl_rt.runtime.kv_cache import PAGE_SIZE, KvCache
from internvl_rt.runtime.request import Request
from internvl_rt.runtime.runner import MAX_BATCH, Part, Runner

logger = logging.getLogger("internvl_rt")

DEFAULT_PREFILL_CHUNK = 512


class Engine:
    """Continuous batching over a paged KV cache.

    A step runs every decoding request for one token and up to prefill_chunk prompt tokens of
    those that are not there yet. A request is admitted when the pages for its prompt and its
    longest answer are free, so that an admitted one always finishes.
    """

    def __init__(
        self, model: InternVL, *, kv_tokens: int, prefill_chunk: int = DEFAULT_PREFILL_CHUNK
    ) -> None:
        text, pages = model.config.text, KvCache.pages_for(kv_tokens)
        self.model = model
        self.prefill_chunk = prefill_chunk
        with model.platform.lock, model.platform.scope():
            self.cache = KvCache(text, pages, model.dtype, model.platform.device)
            self._runner = Runner(model, self.cache)
        # Longest prompt and answer together.
        self.context = min(text.context, self.cache.capacity * PAGE_SIZE)
        self._lock = threading.Lock()
        self._requests: list[Request] = []  # in the order they came; those that run have pages
        self._latest = threading.Lock()  # held as long as the latest step runs
        self._found: list[tuple[Part, int | None]] = []  # by a step, not handed out yet

    @property
    def free_pages(self) -> int:
        return self.cache.capacity - sum(len(r.pages) for r in self._running)

    def submit(self, *requests: Request) -> None:
        """Queues requests; ValueError, and none is queued, if a prompt can never fit."""
        for request in requests:
            if not len(request.prompt):
                raise ValueError("the prompt is empty")
            if len(request.prompt) >= self.context:
                raise ValueError(
                    f"the prompt has {len(request.prompt)} tokens, the context {self.context} "
                    "including the answer"
                )
        with self._lock:
            self._requests = [*self._requests, *requests]

    def cancel(self, request: Request) -> None:
        """Ends a request; its pages are free at the next step.

        Takes no lock: it is also called where a dropped iterator is collected, in any thread.
        """
        request.finish("cancelled")

    def stream(self, request: Request) -> Iterator[int]:
        """The request's tokens as they come; raises the request's error.

        Closing the iterator early cancels the request.
        """
        read = 0
        try:
            while not request.finished or read < len(request.tokens):
                self._wait(request, read)
                while read < len(request.tokens):
                    yield request.tokens[read]
                    read += 1
        finally:
            self.cancel(request)
        if request.error:
            raise request.error

    def run(self, requests: Sequence[Request]) -> None:
        """Drives all requests to their ends. Errors stay with the requests."""
        try:
            for request in requests:
                while not request.finished:
                    self._wait(request, len(request.tokens))
        finally:
            for request in requests:
                self.cancel(request)

    def _wait(self, request: Request, read: int) -> None:
        """Until the request has more than `read` tokens or is finished; steps if nobody else does.

        Ctrl-C raises wherever it comes in between: locks are held by `with` alone, which lets go
        of them even then.
        """
        while len(request.tokens) <= read and not request.finished:
            step = threading.Lock()
            with step:
                with self._lock:
                    latest = self._latest
                    if not latest.locked():
                        self._latest = step
                if self._latest is step:
                    self._step()
            with latest:  # of another thread: until it is over
                pass

    # A step. Only one thread is in here at a time, and Ctrl-C may end it anywhere: what has
    # become of a request is one attribute of it, set at once, and whatever a step did by then is
    # done once more by the next one, to the same effect.

    def _step(self) -> None:
        self._commit()
        with self._lock:
            self._requests = [r for r in self._requests if not r.finished]
        self._admit()
        for request in self._running:
            if request.pixels is not None:
                self._encode(request)
        parts = self._schedule()
        if not parts:
            return
        try:
            with self.model.platform.lock, self.model.platform.scope():
                self._found = self._runner(parts)
        except Exception as error:
            logger.exception("a step failed")
            for part in parts:
                part.request.finish("error", error)
            return
        self._commit()

    @property
    def _running(self) -> list[Request]:
        return [r for r in self._requests if r.pages is not None and not r.finished]

    def _admit(self) -> None:
        for request in [r for r in self._requests if r.pages is None]:
            running = self._running
            longest = min(len(request.prompt) + request.params.max_new_tokens, self.context)
            pages = KvCache.pages_for(longest)
            if len(running) == MAX_BATCH or pages > self.free_pages:
                break
            request.pages = self.cache.free([r.pages for r in running])[:pages].clone()

    def _encode(self, request: Request) -> None:
        try:
            with self.model.platform.lock, self.model.platform.scope():
                image = self.model.encode_images(request.pixels).flatten(0, 1)  # [N, hidden]
                finite = bool(self.model.platform.fetch(torch.isfinite(image).all()))
            if not finite:
                raise ValueError("the pictures gave NaN or infinite features")
            request.image, request.pixels = image, None
        except Exception as error:
            request.finish("error", error)

    def _schedule(self) -> list[Part]:
        parts = []
        budget = self.prefill_chunk
        for request in self._running:
            left = len(request.prompt) - request.done
            if left <= 0:
                parts.append(Part(request, request.done, 1))
            elif budget > 0:
                parts.append(Part(request, request.done, min(budget, left)))
                budget -= parts[-1].count
        return parts

    def _commit(self) -> None:
        """Hands out what the latest step found. Nothing can fail but a request's own on_token."""
        for part, token in self._found:
            request = part.request
            if request.finished:
                continue
            request.done = part.end
            if request.done == len(request.prompt):
                request.image = None
            if token is not None:
                self._accept(request, part.end - len(request.prompt), token)
        self._found = []

    def _accept(self, request: Request, index: int, token: int) -> None:
        """`token` is the answer's at `index`."""
        if token < 0:
            request.finish("error", ValueError("the model gave NaN or infinite logits"))
            return
        stop = token in request.params.stop_ids
        try:
            if not stop and request.on_token is not None:
                stop = request.on_token(index, token)
        except Exception as error:
            request.finish("error", error)
            return
        request.tokens[index:] = [token]
        if stop:
            request.finish("stop")
        elif len(request.tokens) >= request.params.max_new_tokens or (
            request.length >= self.context
        ):
            request.finish("length")
