"""Stillroom's nouns: what a cache, a target, a loss and a student are.

    dataset -> tasks -> Example -> teacher -> Targets -> cache -> stream -> trainer -> run -> report

Imports run only downwards: `trainer`; then `teacher`, `student`, `losses`, `tasks`, `cache`,
`report`, which do not import one another; then `config`, `sources`, `examples`, `runs`; then the
ground floor, `targets`, `metrics`, `errors`. The verbs, one per file, are in `stages`.

Tensor letters: B examples of a batch, T positions of an example, N target positions of a batch
(those whose distribution the teacher gives), M feature positions of a batch (those whose hidden
state is kept), K kept classes, R tail draws, V classes, L layers, D width.
"""

__version__ = "0.1.0"
