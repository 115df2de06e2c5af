//! What nginx reads of a module's file.

/// The tables of a module: the statics by which nginx finds what is in the file, and the two modules
/// in it.
#[macro_export]
macro_rules! tables {
    (
        $protocol:ty,
        $module:ident($name:literal, $type:path, $context:ident, $commands:ident),
        $recovery:ident($recovery_name:literal, $recovery_short:literal),
        $zones:literal $(,)?
    ) => {
        /// The modules in this file, for `load_module`.
        #[unsafe(no_mangle)]
        #[allow(non_upper_case_globals)]
        pub static mut ngx_modules: [*const $crate::nginx_sys::ngx_module_t; 3] =
            [::core::ptr::addr_of!($recovery), ::core::ptr::addr_of!($module), ::core::ptr::null()];

        /// Their names.
        #[unsafe(no_mangle)]
        #[allow(non_upper_case_globals)]
        pub static mut ngx_module_names: [*const ::core::ffi::c_char; 3] =
            [$recovery_name.as_ptr(), $name.as_ptr(), ::core::ptr::null()];

        /// The first comes before nginx's own module of zones: a new worker must mend the lists
        /// before that takes their locks. The other one is where nginx puts it.
        #[unsafe(no_mangle)]
        #[allow(non_upper_case_globals)]
        pub static mut ngx_module_order: [*const ::core::ffi::c_char; 3] =
            [$recovery_name.as_ptr(), $zones.as_ptr(), ::core::ptr::null()];

        static mut RECOVERY: $crate::nginx_sys::ngx_core_module_t =
            $crate::nginx_sys::ngx_core_module_t {
                name: $crate::ngx::ngx_string!($recovery_short),
                create_conf: None,
                init_conf: None,
            };

        /// What a new worker does before all else.
        #[used]
        #[allow(non_upper_case_globals)]
        pub static mut $recovery: $crate::nginx_sys::ngx_module_t =
            $crate::nginx_sys::ngx_module_t {
                ctx: ::core::ptr::addr_of_mut!(RECOVERY).cast(),
                commands: ::core::ptr::null_mut(),
                type_: $crate::nginx_sys::NGX_CORE_MODULE as _,

                init_process: Some($crate::process::recover::<$protocol>),

                ..$crate::nginx_sys::ngx_module_t::default()
            };

        /// The module that the directives are of.
        #[used]
        #[allow(non_upper_case_globals)]
        pub static mut $module: $crate::nginx_sys::ngx_module_t = $crate::nginx_sys::ngx_module_t {
            ctx: ::core::ptr::addr_of!($context).cast_mut().cast(),
            commands: ::core::ptr::addr_of_mut!($commands).cast(),
            type_: $type as _,

            init_module: Some($crate::process::init_module::<$protocol>),
            init_process: Some($crate::process::init_process::<$protocol>),
            exit_process: Some($crate::process::exit_process::<$protocol>),

            ..$crate::nginx_sys::ngx_module_t::default()
        };
    };
}
