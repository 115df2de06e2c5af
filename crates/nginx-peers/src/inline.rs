//! The wrappers that `build.rs` makes of the headers in `abi`.

#![allow(non_camel_case_types, non_upper_case_globals, missing_docs, clippy::all, unused_imports)]
#![allow(clippy::undocumented_unsafe_blocks)]

include!(concat!(env!("OUT_DIR"), "/inline.rs"));
