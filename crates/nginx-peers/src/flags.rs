//! Flags of a request that nginx-sys' own accessors do not find on every nginx: see `inline.h`.

pub use crate::inline::{
    nginx_request_disable_not_modified as disable_not_modified, nginx_request_hold as hold,
    nginx_request_is_header_only as is_header_only,
    nginx_request_set_header_only as set_header_only,
};
