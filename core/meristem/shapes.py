"""The legend of dimensions, used by every signature of the project.

| dim | meaning                                   | dim | meaning                       |
| --- | ----------------------------------------- | --- | ----------------------------- |
| T   | packed tokens (rows) of a batch           | V   | vocabulary                    |
| U   | packed tokens of the key side             | L   | layers                        |
| S   | sequences in the pack                     | P   | features of a patch           |
| D   | width of the trunk                        | A   | position axes                 |
| H   | query heads                               | M   | scored positions              |
| K   | key/value heads                           | C   | classes                       |
| E   | width of a head                           | N   | records                       |
| F   | width of the feed-forward layer           | n   | tokens of one sequence        |
| X   | experts                                   | k   | experts a token is sent to    |

There is no batch axis in the trunk: sequences lie end to end along T. In bodies a suffix names the
layout where it changes (`q_THE`, `scores_HTU`).
"""

from jaxtyping import Bool, Float, Float32, Float64, Int, Int64, Integer, UInt8
from torch import Tensor

__all__ = ["Bool", "Float", "Float32", "Float64", "Int", "Int64", "Integer", "Tensor", "UInt8"]
