"""The walk back, weighed: `pull` again, with what is alive counted after every pullback."""

from contextlib import contextmanager

import numpy as np

from minilora.engine import recompute, tensor
from minilora.engine.check import arrays_of, root_of
from minilora.engine.graph import Node, ordered, shared


class Meter:
    """The most bytes that the engine holds at once: saved arrays, cotangents, sums of them.

    Each root buffer counts once; those of `besides` do not.  A block that is run again has a
    walk within the walk: what both hold counts.  Temporaries inside a pullback are not seen.
    """

    def __init__(self, besides):
        self.besides = {id(root_of(a)) for a in besides}
        self.frames = []  # of each walk under way: a function that lists the arrays it holds
        self.peak = 0

    def weigh(self, *more):
        roots = {}
        for array in (*more, *(a for frame in self.frames for a in frame())):
            if isinstance(array, np.ndarray):
                root = root_of(array)
                roots[id(root)] = root.nbytes
        self.peak = max(self.peak, sum(n for i, n in roots.items() if i not in self.besides))

    def pull(self, outputs, cotangents, into=None):
        """`engine.graph.pull`, one line after the other, and `weigh` between them."""
        gradients = {} if into is None else into
        waiting, ours = {}, set()
        order = ordered(outputs)
        kept = {node: [a for _, p in node.edges for a in arrays_of(p)] for node in order}
        ends = [output.data for output in outputs]
        now = []

        def held():
            arrays = [*ends, *now, *waiting.values()]
            arrays += [a for saved in kept.values() for a in saved]
            return arrays if into is not None else [*arrays, *gradients.values()]

        def arrive(parent, g):
            target, _ = parent
            if isinstance(target, Node):
                table, key = waiting, parent
            elif into is not None:
                into[target] += g
                return
            else:
                table, key = gradients, target
            if key not in table:
                table[key] = g
            elif key in ours:
                table[key] += g
            else:
                total = table[key] + g
                self.weigh(total)
                table[key] = total
                ours.add(key)

        self.frames.append(held)
        for output, g in zip(outputs, cotangents, strict=True):
            if output.target is not None and g is not None:
                arrive((output.target, output.slot), g)
        while order:
            node = order.pop()
            edges, node.edges = node.edges, None
            if node.outputs is None:
                g = waiting.pop((node, 0), None)
                arrived = g is not None
            else:
                g = tuple(waiting.pop((node, slot), None) for slot in range(node.outputs))
                arrived = any(part is not None for part in g)
            now[:] = g if isinstance(g, tuple) else [g]
            if arrived:
                for parents, pullback in edges:
                    found = pullback(g) if isinstance(pullback, shared) else (pullback(g),)
                    self.weigh(*found)
                    for parent, cotangent in zip(parents, found, strict=True):
                        if cotangent is not None:
                            arrive(parent, cotangent)
                    del found
            edges = pullback = None
            del kept[node]
            now.clear()
        self.frames.pop()
        return gradients


@contextmanager
def weighed(besides):
    """Inside, walks back are weighed; yields the Meter."""
    meter, real = Meter(besides), tensor.pull
    tensor.pull = recompute.pull = meter.pull
    try:
        yield meter
    finally:
        tensor.pull = recompute.pull = real
