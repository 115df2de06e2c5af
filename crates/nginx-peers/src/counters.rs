//! What nginx keeps beside the links of a list, as functions of the list alone.

/// The counters and flags of one list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// How many peers.
    pub number: usize,
    /// The sum of their weights.
    pub total_weight: usize,
    /// How many are not down.
    pub tries: usize,
}

impl Counters {
    /// Counts one more peer.
    pub fn add(&mut self, weight: usize, down: bool) {
        self.number += 1;
        // Weights come from 32 bits and lists are bounded: only a hostile static configuration
        // could get here, and nginx's own sum would wrap for it, too.
        self.total_weight = self.total_weight.wrapping_add(weight);
        self.tries += usize::from(!down);
    }

    /// nginx's flag for "at least one weight is not 1".
    pub fn weighted(&self) -> bool {
        self.total_weight != self.number
    }

    /// nginx's flag for "there is nothing to choose": then it counts no failures.
    pub fn single(&self, backups: usize) -> bool {
        self.number == 1 && backups == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_flags() {
        let mut list = Counters::default();
        assert!(!list.single(0) && !list.weighted(), "an empty list is neither");
        list.add(1, false);
        assert!(list.single(0) && !list.single(1) && !list.weighted());
        list.add(3, true);
        assert_eq!(list, Counters { number: 2, total_weight: 4, tries: 1 });
        assert!(!list.single(0) && list.weighted());
    }
}
