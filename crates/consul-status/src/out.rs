//! What the renderers write with: constants, numbers, times, and texts through the escaper.

use std::io::Write;
use std::marker::PhantomData;

use crate::escape::{self, Escape};
use crate::text::Text;
use crate::time::Time;

/// Appends to a buffer in the format whose escaper `E` is.
pub(crate) struct Out<'a, E> {
    buffer: &'a mut Vec<u8>,
    format: PhantomData<E>,
}

impl<'a, E: Escape> Out<'a, E> {
    pub(crate) fn new(buffer: &'a mut Vec<u8>) -> Self {
        Self { buffer, format: PhantomData }
    }

    /// What is constant is ours, and is written as it is.
    pub(crate) fn raw(&mut self, constant: &'static str) -> &mut Self {
        self.buffer.extend_from_slice(constant.as_bytes());
        self
    }

    pub(crate) fn text<const MAX: usize>(&mut self, text: &Text<'_, MAX>) -> &mut Self {
        escape::text::<E, MAX>(text, self.buffer);
        self
    }

    /// A part of a URL.
    pub(crate) fn url(&mut self, bytes: &[u8]) -> &mut Self {
        escape::url(bytes, self.buffer);
        self
    }

    pub(crate) fn number(&mut self, number: impl Into<u64>) -> &mut Self {
        let number: u64 = number.into();
        write!(self.buffer, "{number}").expect("a vector takes all");
        self
    }

    /// `number / 10^digits`, exactly.
    pub(crate) fn decimal(&mut self, number: u64, digits: u32) -> &mut Self {
        let scale = 10_u64.pow(digits);
        let width = digits as usize;
        write!(self.buffer, "{}.{:0width$}", number / scale, number % scale)
            .expect("a vector takes all");
        self
    }

    /// The whole time, as ISO 8601 has it.
    pub(crate) fn time(&mut self, time: Time) -> &mut Self {
        self.buffer.extend_from_slice(&time.iso());
        self
    }

    /// The time to the second without its date: `14:03:11`.
    pub(crate) fn clock(&mut self, time: Time) -> &mut Self {
        self.buffer.extend_from_slice(&time.iso()[11..19]);
        self
    }

    /// The date: `2026-03-02`.
    pub(crate) fn date(&mut self, time: Time) -> &mut Self {
        self.buffer.extend_from_slice(&time.iso()[..10]);
        self
    }

    /// The last byte of the piece that is being written.
    pub(crate) fn last(&self) -> Option<u8> {
        self.buffer.last().copied()
    }
}
