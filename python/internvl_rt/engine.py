"""The engine: admits requests, forms batches, runs the model, samples, hands out tokens.

There is no background thread. Whoever waits for a request drives the engine; callers in several
threads share its steps, so their requests run as one batch. A request's tokens depend on its own
prompt, parameters and seed alone, and so does its failure.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
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
        with model.platform.scope():
            self.cache = KvCache(text, pages, model.dtype, model.platform.device)
            self._runner = Runner(model, self.cache)
        # Longest prompt and answer together.
        self.context = min(text.context, self.cache.allocator.capacity * PAGE_SIZE)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._turn = threading.Condition()
        self._stepping = False

    def submit(self, request: Request) -> None:
        """Queues a request; ValueError if its prompt can never fit."""
        if not len(request.prompt):
            raise ValueError("the prompt is empty")
        if len(request.prompt) >= self.context:
            raise ValueError(
                f"the prompt has {len(request.prompt)} tokens, the context {self.context} "
                "including the answer"
            )
        with self._turn:
            self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Ends a request at the next step; its pages are free from then on."""
        with self._turn:
            request.cancelled = True
            if not self._stepping:
                self._drop_cancelled()
            self._turn.notify_all()

    def stream(self, request: Request) -> Iterator[int]:
        """The request's new tokens as they come; raises the request's error.

        Closing the iterator early cancels the request.
        """
        try:
            while True:
                self._wait(request)
                while request.events:
                    yield request.events.popleft()
                if request.finished and not request.events:
                    break
        finally:
            if not request.finished:
                self.cancel(request)
        if request.error:
            raise request.error

    def run(self, requests: Sequence[Request]) -> None:
        """Drives all requests to their ends. Errors stay with the requests."""
        try:
            for request in requests:
                while not request.finished:
                    self._wait(request)
                    request.events.clear()
        finally:
            for request in requests:
                if not request.finished:
                    self.cancel(request)

    def _wait(self, request: Request) -> None:
        """Returns when the request has events or is finished, stepping if nobody else does."""
        while not request.events and not request.finished:
            ours = False
            try:  # wherever Ctrl-C comes in between, the turn is handed on
                with self._turn:
                    if self._stepping:
                        self._turn.wait()
                        continue
                    self._stepping = ours = True
                self._step()
            finally:
                if ours:
                    self._stepping = False
                    with self._turn:
                        self._turn.notify_all()

    # A step. Only one thread is in here at a time.

    def _step(self) -> None:
        with self._turn:
            self._drop_cancelled()
            self._admit()
        for request in [r for r in self._running if r.pixels is not None]:
            self._encode(request)
        parts = self._schedule()
        if not parts:
            return
        try:
            with self.model.platform.scope():
                found = self._runner(parts)
        except Exception as error:
            logger.exception("a step failed")
            for part in parts:
                self._fail(part.request, error)
            return
        # From here on nothing can fail: the step is committed as a whole.
        for part in parts:
            request = part.request
            request.done += part.count
            if request.done == len(request.prompt):
                request.image = None
        for request, token in found:
            self._accept(request, token)

    def _drop_cancelled(self) -> None:
        for request in [r for r in (*self._running, *self._waiting) if r.cancelled]:
            self._finish(request, "cancelled")

    def _admit(self) -> None:
        while self._waiting and len(self._running) < MAX_BATCH:
            request = self._waiting[0]
            longest = min(len(request.prompt) + request.params.max_new_tokens, self.context)
            pages = KvCache.pages_for(longest)
            if pages > self.cache.allocator.available:
                break
            request.pages = self.cache.allocator.take(pages)
            self._waiting.popleft()
            self._running.append(request)

    def _encode(self, request: Request) -> None:
        try:
            with self.model.platform.scope():
                image = self.model.encode_images(request.pixels).flatten(0, 1)  # [N, hidden]
                finite = bool(self.model.platform.fetch(torch.isfinite(image).all()))
            if not finite:
                raise ValueError("the pictures gave NaN or infinite features")
            request.image, request.pixels = image, None
        except Exception as error:
            self._fail(request, error)

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

    def _accept(self, request: Request, token: int) -> None:
        if token < 0:
            self._fail(request, ValueError("the model gave NaN or infinite logits"))
            return
        request.tokens.append(token)
        stop = token in request.params.stop_ids
        try:
            if not stop and request.on_token is not None:
                stop = request.on_token(token)
        except Exception as error:
            self._fail(request, error)
            return
        request.events.append(token)
        if stop:
            self._finish(request, "stop")
        elif len(request.tokens) >= request.params.max_new_tokens or (
            request.length >= self.context
        ):
            self._finish(request, "length")

    def _fail(self, request: Request, error: Exception) -> None:
        request.error = error
        self._finish(request, "error")

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        request.image = request.pixels = None
        if request.pages is not None:
            self.cache.allocator.give_back(request.pages)
            request.pages = None
        for queue in (self._running, self._waiting):
            if request in queue:
                queue.remove(request)
