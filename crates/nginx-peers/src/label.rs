//! By what name an instance is known.

use std::fmt;

use crate::abi::PeerAbi;

/// The longest service ID that is kept, in bytes. With [`NODE`] and any address a label stays within
/// one slot of 256 bytes.
const ID: usize = 88;
/// The longest node name that is kept, in bytes.
const NODE: usize = 64;

/// What a label begins with: that it is one, and of which form.
const MAGIC: [u8; 2] = [0xC5, 1];

/// An instance's node and service ID: which one it is, whatever its address; and the source that
/// it comes from.
///
/// It stands in shared memory behind the text of the peer's `server`, so that a worker that takes
/// over the list knows what it finds. Both texts are safe to log: what is not printable ASCII is
/// escaped, and what is too long is cut.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Label {
    node: String,
    id: String,
    source: u64,
}

impl Label {
    /// The label of an instance. The source is a number that the caller knows it by again.
    pub fn new(node: &str, id: &str, source: u64) -> Self {
        Self { node: cut(node, NODE), id: cut(id, ID), source }
    }

    /// The most bytes that a label takes in shared memory.
    pub const SIZE: usize = MAGIC.len() + size_of::<u64>() + 2 + NODE + ID;

    /// Copies the bytes of a peer's label, if it has one; says how many there are.
    ///
    /// # Safety
    ///
    /// `peer` is live, in a zone that ends at `end`.
    pub unsafe fn copy<P: PeerAbi>(
        peer: *mut P,
        end: *const u8,
        to: &mut [u8; Self::SIZE],
    ) -> usize {
        // SAFETY: the caller's promise; texts do not change while the peer lives, and what is read
        // behind the server's lies in the zone.
        unsafe {
            let server = *P::server(peer);
            let behind = server.data.wrapping_add(server.len).cast_const();
            let room = end.addr().saturating_sub(behind.addr());
            match Self::len_at(behind, room).filter(|len| *len <= to.len()) {
                Some(len) => {
                    core::ptr::copy_nonoverlapping(behind, to.as_mut_ptr(), len);
                    len
                }
                None => 0,
            }
        }
    }

    /// The label that such bytes are.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let mut bytes = bytes.iter();
        // Zeros make no label.
        Self::decode(|| bytes.next().copied().unwrap_or(0))
    }

    /// Where the instance comes from.
    pub fn source(&self) -> u64 {
        self.source
    }

    /// The service ID.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The node's name.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// How many bytes [`Self::encode`] appends.
    pub(crate) fn encoded_len(&self) -> usize {
        MAGIC.len() + size_of::<u64>() + 2 + self.node.len() + self.id.len()
    }

    /// Appends the label to a peer's text: each part with its length in front.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&self.source.to_ne_bytes());
        for part in [&self.node, &self.id] {
            // At most 88: `cut` saw to it.
            out.push(part.len() as u8);
            out.extend_from_slice(part.as_bytes());
        }
    }

    /// How many bytes the label takes that begins at `at`. `None` for what is no label, or has no
    /// room for one.
    ///
    /// # Safety
    ///
    /// There are `room` bytes.
    pub(crate) unsafe fn len_at(at: *const u8, room: usize) -> Option<usize> {
        // SAFETY: the caller's promise; nothing is read behind it.
        let byte = |n: usize| (n < room).then(|| unsafe { *at.add(n) });
        let node = MAGIC.len() + size_of::<u64>();
        if byte(0)? != MAGIC[0] || byte(1)? != MAGIC[1] {
            return None;
        }
        let id = node + 1 + usize::from(byte(node)?);
        let len = id + 1 + usize::from(byte(id)?);
        (len <= room).then_some(len)
    }

    /// Reads a label; `bytes` gives one byte at a time, from behind the peer's text. `None` for
    /// what is no label of this form: another version of the module may have left it.
    pub(crate) fn decode(mut bytes: impl FnMut() -> u8) -> Option<Self> {
        if !MAGIC.into_iter().all(|byte| bytes() == byte) {
            return None;
        }
        let source = u64::from_ne_bytes(std::array::from_fn(|_| bytes()));
        let mut part = || {
            let len = bytes();
            let text: Vec<u8> = (0..len).map(|_| bytes()).collect();
            String::from_utf8_lossy(&text).into_owned()
        };
        Some(Self { node: part(), id: part(), source })
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)
    }
}

fn cut(text: &str, limit: usize) -> String {
    let mut out = String::new();
    for c in text.chars() {
        let before = out.len();
        match c {
            // A quote or a backslash could make a log line say what it does not.
            '"' | '\\' => out.extend(['\\', c]),
            ' '..='~' => out.push(c),
            _ => out.extend(c.escape_default()),
        }
        if out.len() > limit {
            out.truncate(before);
            break;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn texts_are_printable_and_bounded() {
        let label = Label::new("n\n1", "we\"b\u{202e}", 7);
        assert_eq!((label.node(), label.id()), ("n\\n1", "we\\\"b\\u{202e}"));
        let label = Label::new(&"n".repeat(500), &"é".repeat(500), 7);
        assert_eq!(label.node().len(), NODE);
        // Whole escapes, six bytes each.
        assert_eq!(label.id().len(), ID / 6 * 6);
    }

    #[test]
    fn what_is_no_label_is_not_read_as_one() {
        for bytes in [[0, 0], [0xC5, 2], [b'w', b'e']] {
            let mut bytes = bytes.into_iter();
            // It would panic if it read on.
            assert_eq!(Label::decode(|| bytes.next().unwrap()), None);
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(node in "\\PC{0,80}", id in ".{0,120}", source: u64) {
            let label = Label::new(&node, &id, source);
            prop_assert!(label.to_string().bytes().all(|b| (b' '..=b'~').contains(&b)));
            let mut bytes = Vec::new();
            label.encode(&mut bytes);
            prop_assert_eq!(bytes.len(), label.encoded_len());
            for room in 0..bytes.len() + 1 {
                let expected = (room == bytes.len()).then_some(room);
                // SAFETY: there are so many bytes.
                prop_assert_eq!(unsafe { Label::len_at(bytes.as_ptr(), room) }, expected);
            }
            let mut bytes = bytes.into_iter();
            prop_assert_eq!(Label::decode(|| bytes.next().unwrap()), Some(label));
        }
    }
}
