//! The order in which the document is written, a small step at a time.
//!
//! An answer stops between any two steps, and goes on when the client has read.

/// The lists of an upstream, in the order in which they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum List {
    Sources,
    Peers,
    Excluded,
    Changes,
}

/// What is written next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// What stands before all upstreams.
    Start,
    /// An upstream, and what stands before its lists.
    Enter(usize),
    /// A list of it begins.
    Open(usize, List),
    /// An entry of the list.
    Item(usize, List, usize),
    /// The list ends.
    Close(usize, List),
    /// The upstream ends.
    Leave(usize),
    /// What stands behind all upstreams.
    Finish,
}

/// A way through some upstreams.
#[derive(Debug)]
pub(crate) struct Walk {
    /// The upstreams, by their number in the document, in the order of the walk.
    order: Vec<usize>,
    entered: usize,
    step: Option<Step>,
}

impl Walk {
    pub(crate) fn new(order: Vec<usize>) -> Self {
        Self { order, entered: 0, step: Some(Step::Start) }
    }

    /// What is to be written; `None` when all is.
    pub(crate) fn step(&self) -> Option<Step> {
        self.step
    }

    /// Goes on, after a step was written. `len` says how long a list is.
    pub(crate) fn advance(&mut self, len: impl FnOnce(usize, List) -> usize) {
        self.step = match self.step {
            Some(Step::Start | Step::Leave(_)) => Some(self.enter()),
            Some(Step::Enter(at)) => Some(Step::Open(at, List::Sources)),
            Some(Step::Open(at, list)) => Some(item(at, list, 0, len)),
            Some(Step::Item(at, list, nth)) => Some(item(at, list, nth + 1, len)),
            Some(Step::Close(at, list)) => Some(match list {
                List::Sources => Step::Open(at, List::Peers),
                List::Peers => Step::Open(at, List::Excluded),
                List::Excluded => Step::Open(at, List::Changes),
                List::Changes => Step::Leave(at),
            }),
            Some(Step::Finish) | None => None,
        };
    }

    /// Goes on to the next upstream, without anything more of this one.
    pub(crate) fn skip(&mut self) {
        self.step = Some(self.enter());
    }

    fn enter(&mut self) -> Step {
        let next = self.order.get(self.entered).map_or(Step::Finish, |at| Step::Enter(*at));
        self.entered += 1;
        next
    }
}

fn item(at: usize, list: List, nth: usize, len: impl FnOnce(usize, List) -> usize) -> Step {
    if nth < len(at, list) { Step::Item(at, list, nth) } else { Step::Close(at, list) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_once_and_in_order() {
        let mut walk = Walk::new(vec![1, 0, 2]);
        let mut seen = Vec::new();
        while let Some(step) = walk.step() {
            seen.push(step);
            match step {
                Step::Enter(0) => walk.skip(),
                _ => walk.advance(|at, list| if list == List::Peers { at } else { 0 }),
            }
        }
        let upstream = |at: usize| {
            let list = |list, len| {
                let items = (0..len).map(move |nth| Step::Item(at, list, nth));
                [Step::Open(at, list)].into_iter().chain(items).chain([Step::Close(at, list)])
            };
            let lists = list(List::Sources, 0)
                .chain(list(List::Peers, at))
                .chain(list(List::Excluded, 0))
                .chain(list(List::Changes, 0));
            let steps = [Step::Enter(at)].into_iter().chain(lists);
            steps.chain([Step::Leave(at)]).collect::<Vec<_>>()
        };
        let mut expected = vec![Step::Start];
        expected.extend(upstream(1));
        expected.push(Step::Enter(0));
        expected.extend(upstream(2));
        expected.push(Step::Finish);
        assert_eq!(seen, expected);
    }
}
