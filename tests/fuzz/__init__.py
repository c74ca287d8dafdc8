"""Random calls of every public function on guarded memory: ``make fuzz``.

`cases` makes one call from a seed and checks it, `layouts` says where its operands lie. `worker` makes one after the other for one
instruction set and outlives its crashes, `__main__` runs the workers and reports, `mutants` shows that planted faults are found.
"""
