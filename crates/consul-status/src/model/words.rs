//! The words that programs look for. Each is a contract.

macro_rules! words {
    ($($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $word:literal,)+ })+) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$doc])* $variant,)+
        }

        impl $name {
            /// All there are, in the order of the contract.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The word for it.
            pub const fn word(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)+
                }
            }
        }
    )+};
}

words! {
    /// Where an upstream belongs to.
    Protocol {
        /// `http {}`
        Http = "http",
        /// `stream {}`
        Stream = "stream",
    }

    /// What the consul thread does.
    ThreadState {
        /// It has not begun.
        Starting = "starting",
        /// It follows Consul.
        Running = "running",
        /// It panicked, and is about to be started again.
        Backoff = "backoff",
        /// There was no heartbeat for 15 s: the first worker was stopped, or is gone.
        Silent = "silent",
    }

    /// How an upstream stands to what Consul says. The first that holds counts.
    Sync {
        /// Consul refuses the query, or hides instances from the token.
        Denied = "denied",
        /// The last answer was not applied.
        Refused = "refused",
        /// There was no good answer for too long.
        Stale = "stale",
        /// Too few instances are healthy, so all serve.
        Panic = "panic",
        /// Removals are held back.
        Held = "held",
        /// What serves was carried over or read from the state file; no answer yet.
        Restored = "restored",
        /// There is nothing yet.
        Starting = "starting",
        /// What serves is what Consul says.
        InSync = "in-sync",
    }

    /// The worst status that serves, of a source.
    Health {
        /// Passing instances alone.
        Passing = "passing",
        /// Those that warn, too.
        Warning = "warning",
        /// Critical ones as well.
        Any = "any",
    }

    /// How healthy an instance is.
    Status {
        /// All checks pass.
        Passing = "passing",
        /// A check warns.
        Warning = "warning",
        /// A check fails.
        Critical = "critical",
        /// An operator took it out.
        Maintenance = "maintenance",
    }

    /// Why an instance serves although Consul's status alone would take it out.
    KeptBy {
        /// Its loss is held back.
        Guard = "guard",
        /// Too few are healthy.
        Panic = "panic",
    }

    /// What can go wrong between the module and Consul.
    Cause {
        /// Refused, timed out, TLS.
        Transport = "transport",
        /// An answer of 4xx or 5xx.
        Status = "status",
        /// 403, or an answer that was filtered by ACLs.
        Denied = "denied",
        /// JSON, index or bounds.
        Invalid = "invalid",
    }

    /// Why an instance does not serve.
    Reason {
        /// A check is critical.
        Critical = "critical",
        /// A check warns.
        Warning = "warning",
        /// An operator took it out.
        Maintenance = "maintenance",
        /// It lacks a tag.
        Tag = "tag",
        /// Its weight is 0.
        WeightZero = "weight-0",
        /// Its address is neither an IP address nor a host name.
        InvalidAddress = "invalid-address",
        /// Its host name has no known address.
        Unresolved = "unresolved",
        /// It has no port.
        NoPort = "no-port",
        /// Its port is no number from 1 to 65535.
        InvalidPort = "invalid-port",
        /// Another instance that serves has the same address and port.
        Duplicate = "duplicate",
        /// The update it came with was refused.
        NotApplied = "not-applied",
    }

    /// What nginx does with a peer, in the words of NGINX Plus.
    PeerState {
        /// It is picked.
        Up = "up",
        /// It gets no new sessions.
        Draining = "draining",
        /// It was taken out by the configuration or by its `Meta`.
        Down = "down",
        /// It failed too often, and is left alone for a while.
        Unavail = "unavail",
    }

    /// What a change did to an address.
    Sign {
        /// It began to serve.
        Added = "+",
        /// It ended.
        Removed = "-",
        /// It got other attributes.
        Changed = "~",
    }
}

impl Sync {
    /// Whether nothing is to be said about it.
    pub fn is_in_sync(self) -> bool {
        self == Self::InSync
    }
}
