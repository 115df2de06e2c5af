//! The parameter `filter=` as it comes out of nginx's lexer.
//!
//! For the lexer a quote has a meaning only where a word begins. `'filter=a == "b"'` is one word
//! and arrives as it was meant. `filter="a == \"b\""` is several: here they are put together again.
//! Escapes are resolved by then, so the quote that ends it is the one before which the expression's
//! own quotes are in pairs. (Consul's strings are in double quotes or in backticks.)

use nginx_sys::ngx_str_t;

use super::argument::shown;

/// The expression that begins with `value`, with the words after it that belong to it.
pub fn expression<'a>(
    value: &[u8],
    following: &mut impl Iterator<Item = &'a ngx_str_t>,
) -> Result<Vec<u8>, String> {
    let unclear = || {
        let begin = shown(value);
        format!("cannot read parameter \"filter={begin}\", quote the whole: 'filter=EXPRESSION'")
    };
    if value.iter().any(u8::is_ascii_whitespace) {
        // It was quoted as a whole; the expression itself begins with a string.
        return Ok(value.to_vec());
    }
    match value.first() {
        Some(b'"') => (),
        // nginx takes the strings inside for words of their own, and their quotes away.
        Some(b'\'') => return Err(unclear()),
        _ => return Ok(value.to_vec()),
    }
    let mut text = value[1..].to_vec();
    while !ends(&text) {
        let word = following.next().ok_or_else(unclear)?.as_bytes();
        // Such a word was in quotes, and what they looked like is not known any more.
        if word.is_empty() || word.iter().any(u8::is_ascii_whitespace) {
            return Err(unclear());
        }
        text.push(b' ');
        text.extend_from_slice(word);
    }
    text.pop();
    Ok(text.trim_ascii().to_vec())
}

/// Whether the last character is the quote that ends an expression.
fn ends(text: &[u8]) -> bool {
    let quotes = text.iter().filter(|byte| **byte == b'"').count();
    text.ends_with(b"\"") && quotes % 2 == 1
}
