//! The token that claims are of, as it came in a request.

use std::sync::Arc;

use zeroize::Zeroizing;

use super::{claims::Claims, rules::Rule, verify::Token};
use crate::request::Request;

/// For claims that these rules verified of this request: the text that they were
/// read from. `None` where it is not a JWT, or no longer there.
pub fn original(
    rules: &[Arc<Rule>],
    request: &Request<'_>,
    claims: &Claims,
) -> Option<Zeroizing<String>> {
    let found = rules.iter().flat_map(|rule| rule.locations.find(request));
    found
        .map(|found| Zeroizing::new(found.text.into_owned()))
        .find(|text| Token::parse(text).is_ok_and(|token| token.says(claims)))
}
