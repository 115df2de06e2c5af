//! What nginx reads of a module's file.

/// The tables of a module: the statics by which nginx finds what is in the file, and the two modules
/// in it.
#[macro_export]
macro_rules! tables {
    (
        $protocol:ty, $type:path, $context:ident, $own:path, $zones:literal;
        $module:ident $name:literal; $recovery:ident $recovery_name:literal $recovery_short:literal
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

        static mut COMMANDS: [$crate::nginx_sys::ngx_command_t; $crate::conf::COMMANDS] =
            $crate::conf::commands::<$protocol>($own);

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
            commands: ::core::ptr::addr_of_mut!(COMMANDS).cast(),
            type_: $type as _,

            init_module: Some($crate::process::init_module::<$protocol>),
            init_process: Some($crate::process::init_process::<$protocol>),
            exit_process: Some($crate::process::exit_process::<$protocol>),

            ..$crate::nginx_sys::ngx_module_t::default()
        };
    };
}

/// The items of [`Protocol`](crate::Protocol) that are mere names: modules, places of directives, offsets in
/// the context of the block, and what zone and states are called.
#[macro_export]
macro_rules! names {
    (
        $protocol:ty; $module:ident, $block_module:path, $upstream_module:path; $block:path,
        $upstream:path; $main_offset:path, $server_offset:path; $zone:literal, $state:literal
    ) => {
        const BLOCK: u32 = $block;
        const UPSTREAM_BLOCK: u32 = $upstream;
        const MAIN_OFFSET: usize = $main_offset;
        const SERVER_OFFSET: usize = $server_offset;
        const ZONE: &'static str = $zone;
        const STATE: &'static str = $state;

        fn module() -> *mut $crate::nginx_sys::ngx_module_t {
            ::core::ptr::addr_of_mut!($module)
        }

        fn block_module() -> *mut $crate::nginx_sys::ngx_module_t {
            ::core::ptr::addr_of_mut!($block_module)
        }

        fn upstream_module() -> *mut $crate::nginx_sys::ngx_module_t {
            ::core::ptr::addr_of_mut!($upstream_module)
        }

        fn applier() -> &'static ::core::sync::atomic::AtomicPtr<$crate::process::Applier<Self>> {
            use ::core::sync::atomic::AtomicPtr;
            static APPLIER: AtomicPtr<$crate::process::Applier<$protocol>> =
                AtomicPtr::new(::core::ptr::null_mut());
            &APPLIER
        }
    };
}
