"""Workers: the supervised engines, one per model, and what makes, watches and ends their processes.

launch    what one generation is given, and the lines it reports back   (shared by both sides)
zygote    the warm process, seen from the daemon; zygote_process is the process itself
spawn     the plain way to make a worker process
process   one generation's processes: pidfds, the end of the whole tree, orphans
health    pure: readings of one generation -> fine, or why not
verify    the known-answer check against the engine's own API
worker    one worker's lifecycle: the one task that owns its state
fleet     the set of workers
engine    the only module that imports vllm; runs in worker processes only
"""
