//! What the status tells of an upstream's list: put together on nginx's thread, where it is edited.

use std::collections::{BTreeMap, HashSet};

use consul_status::model::{Reason, Sign, Status};
use nginx_peers::{Change, Changed, Spec};

use super::board::Place as Board;
use super::clock::Moment;
use super::record::{self, CHANGES, FIRST, Place, ROWS, Record, Row};

/// Goes on from what was known: in the zone before a reload, or before this worker took the place
/// of one that died.
pub fn begin(place: &Board) -> Record {
    let before = place.read().and_then(|bytes| serde_json::from_slice::<Record>(&bytes).ok());
    let mut record = before.unwrap_or_default();
    record.begun = Moment::now();
    record.refused = false;
    record.missing.clear();
    record.missing_rows.clear();
    // Nothing is known yet of what serves: the thread will say.
    let report = &mut record.report;
    (report.held, report.held_until, report.panic) = (0, None, false);
    report.before = std::mem::take(&mut report.excluded);
    report.omitted = 0;
    report.marks.clear();
    report.more_marks = false;
    for heard in &mut report.sources {
        (heard.failing, heard.next_try, heard.registered) = (None, None, None);
        heard.excluded.values_mut().for_each(|count| *count = 0);
    }
    record
}

/// A set was applied.
pub fn applied(record: &mut Record, change: &Change, index: u64) {
    record.refused = false;
    record.missing.clear();
    record.missing_rows.clear();
    record.applied += 1;
    if change.is_empty() {
        return;
    }
    let now = Moment::now();
    let Change { added, removed, changed, .. } = change;
    let all = [(Sign::Added, added), (Sign::Removed, removed), (Sign::Changed, changed)];
    let all = all.iter().flat_map(|(sign, all)| all.iter().map(|one| (*sign, one)));
    let first = all.take(FIRST);
    record.last_change = Some(now);
    record.changes.push_front(record::Change {
        time: now,
        index,
        added: added.len() as u64,
        removed: removed.len() as u64,
        changed: changed.len() as u64,
        first: first
            .map(|(sign, Changed { address, .. })| (sign.place(), address.to_string()))
            .collect(),
    });
    record.changes.truncate(CHANGES);
}

/// A set was refused: what of it is not in the list does not serve, though it should.
pub fn refused(record: &mut Record, wanted: &[Spec], present: &[Spec], is_again: bool) {
    let now = Moment::now();
    record.not_applied += u64::from(!is_again);
    let before = std::mem::take(&mut record.missing_rows);
    record.refused = true;
    let there: HashSet<_> = present.iter().map(|spec| (&spec.label, spec.address)).collect();
    let mut counts: BTreeMap<u64, u64> = BTreeMap::new();
    for spec in wanted.iter().filter(|spec| !there.contains(&(&spec.label, spec.address))) {
        *counts.entry(spec.label.source()).or_default() += 1;
        if record.missing_rows.len() == ROWS {
            continue;
        }
        let address = spec.address.to_string();
        let since = before.iter().find(|row| row.address == address).map_or(now, |row| row.since);
        let key = spec.label.source();
        let number = record.report.sources.iter().position(|heard| heard.key == key);
        record.missing_rows.push(Row {
            source: number.map_or(0, |number| number as u32 + 1),
            id: spec.label.id().to_owned(),
            node: spec.label.node().to_owned(),
            address,
            reason: Reason::NotApplied.place(),
            status: Status::Passing.place(),
            detail: None,
            since,
        });
    }
    record.missing = counts.into_iter().collect();
}
