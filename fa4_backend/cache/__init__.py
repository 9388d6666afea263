"""What was compiled, kept on disk: kernels and the emulator's native core, in one folder (`fa4_backend.envs.cache_dir`).

    kernels/<arch>/dsl-<version>-<machine>/<name>-<digest>/   kernel.so, kernel.ptx, kernel.cubin, entry.json
    emulator/core-<digest>/                                   core.so, entry.json
    locks/                                                    empty files

A folder that holds an entry.json is an entry: it appears whole, by one rename, and goes whole. `entry` finds, checks and builds entries,
`trust` says whose files may be loaded, `prune` keeps the whole below a limit.
"""
