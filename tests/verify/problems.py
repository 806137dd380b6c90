"""Problems that several tests share."""

from mctune.core.problem import Problem

SMALL = Problem(aggregation="grm", T=8, H=2, Dk=4, Dv=4, segment_length=4)
