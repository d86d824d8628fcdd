"""The benchmark suite: every operator beside what it replaces, in one process, with the machine's ceilings.

``cases`` says what is measured and ``workloads`` how it is written, by us and by others; ``worker`` measures,
in a process of its own for each allocator; ``command`` starts the workers and writes the report. It is run by
``softdimo bench``, or where only torch is installed by ``python -m softdimo_fast.benchmark``. The pytest
suites in ``benchmarks/`` time the same cases.
"""
