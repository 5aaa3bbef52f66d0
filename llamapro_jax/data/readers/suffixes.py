"""Which files of a directory a kind of source reads, and how: by their names alone."""

from __future__ import annotations

from pathlib import PurePath

COMPRESSED = (".gz", ".zst")
LINES = ".jsonl"
PARQUET = ".parquet"
TEXT = (".txt", ".md", ".py", ".rst")

# What people write by hand in a language for programs, markup, queries or builds; data files
# (.json, .csv, .svg, .ipynb) are left out, as they would be most of the bytes of many a repository.
CODE = frozenset(
    """
    .ada .adb .ads .agda .asm .awk .bash .bat .bzl .c .c++ .cc .cl .clj .cljc .cljs .cmake .coffee
    .cpp .cr .cs .css .cts .cu .cuh .cxx .d .dart .dockerfile .el .elm .erl .ex .exs .f .f03 .f08
    .f90 .f95 .fish .for .fs .fsi .fsx .glsl .go .gradle .graphql .groovy .h .h++ .hh .hlsl .hpp
    .hrl .hs .html .hxx .idr .inl .java .jl .js .jsx .kt .kts .lean .less .lhs .lisp .lua .m .mak
    .md .metal .mjs .mk .ml .mli .mm .mts .nim .nix .pas .php .pl .pm .proto .ps1 .psm1 .purs .py
    .pyi .pyx .pxd .qml .r .rb .rkt .rs .rst .s .sass .scala .scm .scss .sh .sml .sol .sql .sv .svh
    .swift .tcl .tex .tf .thrift .toml .ts .tsx .v .vb .vert .vhd .vhdl .vim .vue .wgsl .yaml .yml
    .zig .zsh
    """.split()
)
CODE_NAMES = frozenset(
    ("BUILD", "CMakeLists.txt", "Dockerfile", "GNUmakefile", "Makefile", "Rakefile", "makefile")
)


def layout(name: str, kind: str) -> str | None:
    """How a file of that name is read: `document`, `lines`, `parquet`, or None when it is not."""
    path = PurePath(name)
    if kind == "code":
        known = path.suffix.lower() in CODE or name in CODE_NAMES
        return "document" if known else None
    if path.suffix == PARQUET:
        return "parquet"
    suffix = PurePath(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    if suffix == LINES:
        return "lines"
    return "document" if kind == "text" and suffix in TEXT else None


def described(kind: str) -> str:
    """The suffixes of a kind, for messages."""
    if kind == "code":
        return "one of the suffixes of source code (.py, .c, .rs, ...)"
    names = (*(TEXT if kind == "text" else ()), LINES, PARQUET)
    return f"{', '.join(names)} (or, but for {PARQUET}, in these with {' or '.join(COMPRESSED)})"
