//! What a request does whose list of peers changed after it began to choose.
//!
//! Every change of a list makes the balancers of requests under way answer "busy", because what
//! they remember of it (a bitmap by position, a cached ring) no longer fits: nginx then gives up
//! with 502, though peers are alive. A request that sees the change begins to choose anew
//! instead. The balancer forgets with that which peers it has tried, and how often; the decisions
//! that make up for it are here, the calls in the module.

/// How often a request begins anew. Between two of its steps the list changes once at the most,
/// as a rule; the bound is for a list that changes faster than a worker runs.
const MAX_RESTARTS: u32 = 8;

/// How many addresses a request remembers.
const REMEMBERED: usize = 8;

/// A socket address in brief: a request's memory comes out of its pool, which should not need another
/// block for it. At worst two servers pass for one, after a change, in one request.
fn brief(address: &[u8]) -> u64 {
    // Words, mixed by a multiplication with a large odd number, the fraction of the golden ratio.
    let mix =
        |sum: u64, word: u64| (sum.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let (words, rest) = address.as_chunks::<8>();
    let sum =
        words.iter().fold(address.len() as u64, |sum, word| mix(sum, u64::from_ne_bytes(*word)));
    let rest = rest.iter().fold(0, |word, byte| word << 8 | u64::from(*byte));
    // 0 is none.
    mix(sum, rest).max(1)
}

/// A request's memory of its attempts. It has no destructor: nginx's pools run none.
#[derive(Clone, Copy, Debug)]
pub struct Attempts {
    /// `proxy_next_upstream_tries`; 0 for no limit.
    limit: usize,
    /// Peers given to the request so far.
    given: usize,
    restarts: u32,
    /// The tries that were left when the last peer was given back.
    left: Option<usize>,
    /// Until the limit is known: the tries that the balancer allows.
    full: Option<usize>,
    tried: [u64; REMEMBERED],
    /// Where the next address is remembered.
    next: usize,
}

impl Attempts {
    /// A request that begins, with the limit of `proxy_next_upstream_tries`.
    #[inline]
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            given: 0,
            restarts: 0,
            left: None,
            full: None,
            tried: [0; REMEMBERED],
            next: 0,
        }
    }

    /// A request whose limit cannot be read. nginx lowers what the balancer allows to it, before the
    /// first choice: of more than any list has, just the limit is left.
    #[inline]
    pub fn limited_by(tries: &mut usize) -> Self {
        Self { full: Some(core::mem::replace(tries, usize::MAX)), ..Self::new(0) }
    }

    /// Before each choice: at the first one the limit is known, and the tries are what they should be.
    #[inline]
    pub fn begin(&mut self, tries: &mut usize) {
        if let Some(full) = self.full.take() {
            self.limit = if *tries == usize::MAX { 0 } else { *tries };
            *tries = full.min(*tries);
        }
    }

    /// The request has given a peer back, and has so many tries left.
    #[inline]
    pub fn goes(&mut self, tries: usize) {
        self.left = Some(tries);
    }

    /// It asks for another one. nginx returns the try of a cached connection that was closed under
    /// it, and that is no attempt to count either.
    #[inline]
    pub fn comes_back(&mut self, tries: usize) {
        if self.left.take().is_some_and(|left| tries > left) {
            self.given = self.given.saturating_sub(1);
        }
    }

    /// Whether a request that was told "busy" may begin anew, and counts it.
    pub fn restart(&mut self, list_changed: bool) -> bool {
        if !list_changed || self.restarts >= MAX_RESTARTS {
            return false;
        }
        self.restarts += 1;
        true
    }

    /// The tries that a request has after it began anew: `full` is what the balancer now allows.
    ///
    /// What was left before is no measure: the list may have grown. At least one, since the
    /// request was about to use it.
    pub fn tries(&self, full: usize) -> usize {
        match self.limit {
            0 => full,
            limit => full.min(limit.saturating_sub(self.given)),
        }
        .max(1)
    }

    /// Whether a peer that the balancer chose was tried before it forgot.
    #[inline]
    pub fn was_tried(&self, address: &[u8]) -> bool {
        self.restarts > 0 && self.tried.contains(&brief(address))
    }

    /// How many peers that were tried the request may be offered before it gives up: each of them
    /// once.
    pub fn remembered(&self) -> usize {
        self.tried.iter().filter(|tried| **tried != 0).count()
    }

    /// A peer was given to the request.
    #[inline]
    pub fn given(&mut self) {
        self.given = self.given.saturating_add(1);
    }

    /// It had no answer of it: the peer is one that was tried.
    #[cold]
    pub fn failed(&mut self, address: &[u8]) {
        if let Some(slot) = self.tried.get_mut(self.next) {
            *slot = brief(address);
        }
        self.next = (self.next + 1) % REMEMBERED;
    }

    /// Whether a failed request without tries gets one more. A list of one peer leaves no tries;
    /// when it has grown since, there is somebody to ask.
    pub fn one_more(&self, tries: usize, list_changed: bool, peers: usize) -> bool {
        tries == 0
            && list_changed
            && peers > 0
            && self.restarts < MAX_RESTARTS
            && (self.limit == 0 || self.given < self.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Attempts {
        /// A peer was given, and did not answer.
        fn goes_wrong(&mut self, address: &[u8]) {
            self.given();
            self.failed(address);
        }
    }

    #[test]
    fn begins_anew_only_for_a_change_and_not_for_ever() {
        let mut attempts = Attempts::new(0);
        assert!(!attempts.restart(false), "busy for another reason");
        assert_eq!((0..20).filter(|_| attempts.restart(true)).count(), MAX_RESTARTS as usize);
    }

    #[test]
    fn tries_follow_the_new_list_and_the_limit() {
        let mut attempts = Attempts::new(0);
        attempts.goes_wrong(b"a");
        assert_eq!(attempts.tries(5), 5, "the list grew");
        assert_eq!(attempts.tries(0), 1);

        let mut attempts = Attempts::new(3);
        assert_eq!(attempts.tries(5), 3);
        attempts.goes_wrong(b"a");
        assert_eq!(attempts.tries(5), 2);
        attempts.goes_wrong(b"b");
        attempts.goes_wrong(b"c");
        assert_eq!(attempts.tries(5), 1, "never none: a try is under way");
    }

    #[test]
    fn a_limit_that_cannot_be_read_shows_in_the_tries() {
        for (limit, list, first, grown) in [(0, 1, 1, 5), (3, 1, 1, 3), (3, 4, 3, 3), (9, 4, 4, 5)]
        {
            let mut tries = list;
            let mut attempts = Attempts::limited_by(&mut tries);
            // As nginx does it.
            if limit > 0 && tries > limit {
                tries = limit;
            }
            attempts.begin(&mut tries);
            assert_eq!(tries, first, "limit {limit} of {list}");
            attempts.begin(&mut tries);
            assert_eq!((tries, attempts.tries(5)), (first, grown), "limit {limit} of {list}");
        }
    }

    #[test]
    fn a_cached_connection_that_was_closed_is_no_attempt() {
        let mut attempts = Attempts::new(2);
        attempts.comes_back(2);
        attempts.goes_wrong(b"a");
        attempts.goes(1);
        attempts.comes_back(2);
        assert!(attempts.restart(true));
        assert_eq!(attempts.tries(5), 2);
        attempts.goes_wrong(b"b");
        assert!(attempts.was_tried(b"a"), "it is remembered all the same");
        attempts.goes(1);
        attempts.comes_back(1);
        assert_eq!(attempts.tries(5), 1, "one that failed is one");
    }

    #[test]
    fn remembers_what_the_balancer_forgot() {
        let mut attempts = Attempts::new(0);
        attempts.goes_wrong(b"a");
        assert!(!attempts.was_tried(b"a"), "the balancer remembers by itself");
        assert!(attempts.restart(true));
        assert!(attempts.was_tried(b"a"));
        assert!(!attempts.was_tried(b"b") && !attempts.was_tried(b"a\0"));
        for n in 0..20u8 {
            attempts.goes_wrong(&[n]);
        }
        assert_eq!(attempts.remembered(), REMEMBERED);
        assert!(
            attempts.was_tried(&[19]) && attempts.was_tried(&[12]) && !attempts.was_tried(&[11])
        );
    }

    #[test]
    fn long_addresses_are_told_apart() {
        let mut attempts = Attempts::new(0);
        attempts.goes_wrong(&[7; 110]);
        attempts.restart(true);
        assert!(attempts.was_tried(&[7; 110]) && !attempts.was_tried(&[7; 109]));
        assert!(!attempts.was_tried(&[7; 28]) && !attempts.was_tried(&[]));
    }

    #[test]
    fn one_more_try_when_a_single_peer_failed_and_others_came() {
        let mut attempts = Attempts::new(0);
        attempts.goes_wrong(b"a");
        assert!(attempts.one_more(0, true, 2));
        assert!(!attempts.one_more(1, true, 2), "it has some");
        assert!(!attempts.one_more(0, false, 2), "nothing changed");
        assert!(!attempts.one_more(0, true, 0), "nobody to ask");
        let mut attempts = Attempts::new(1);
        attempts.goes_wrong(b"a");
        assert!(!attempts.one_more(0, true, 2), "the limit");
    }
}
