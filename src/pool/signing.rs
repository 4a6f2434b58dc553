//! The signature of a primary's timeline. The pool's first transaction on the primary makes it for all others.

use std::sync::{Arc, Mutex};

use crate::commit::Signature;
use crate::sync::lock;
use crate::topology::GenerationId;

/// The signature of the newest primary's timeline.
#[derive(Default)]
pub(crate) struct SignatureCache(Mutex<Option<(GenerationId, State)>>);

enum State {
    UnderWay,
    /// `None`: signing is impossible.
    Ended(Option<Arc<Signature>>),
}

/// The state of signing a primary's timeline.
pub(crate) enum SignatureState<'a> {
    /// The timeline has this signature, or none.
    Done(Option<Arc<Signature>>),
    Yours(Signer<'a>),
}

/// Signs a timeline. If this is dropped before [`Signer::ended`], the next transaction signs it.
pub(crate) struct Signer<'a> {
    signatures: &'a SignatureCache,
    id: GenerationId,
}

impl SignatureCache {
    /// Returns the signature of this primary's timeline. Only the first caller gets [`SignatureState::Yours`], and must
    /// sign the timeline.
    pub(crate) fn of(&self, id: GenerationId) -> SignatureState<'_> {
        let mut signature = lock(&self.0);
        match &*signature {
            Some((signed, State::Ended(by))) if *signed == id => SignatureState::Done(by.clone()),
            Some((signed, _)) if *signed >= id => SignatureState::Done(None),
            _ => {
                *signature = Some((id, State::UnderWay));
                SignatureState::Yours(Signer { signatures: self, id })
            }
        }
    }

    /// Returns the signature of this primary's timeline if it is known, or if it is known that there is none.
    #[expect(clippy::option_option, reason = "the outer one says whether it is known")]
    pub(crate) fn done(&self, id: GenerationId) -> Option<Option<Arc<Signature>>> {
        match &*lock(&self.0) {
            Some((signed, State::Ended(by))) if *signed == id => Some(by.clone()),
            _ => None,
        }
    }
}

impl Signer<'_> {
    /// Keeps the signature for the transactions that follow. `None`: signing is impossible here.
    pub(crate) fn ended(self, by: Option<Arc<Signature>>) {
        if let Some((signed, state)) = &mut *lock(&self.signatures.0)
            && *signed == self.id
        {
            *state = State::Ended(by);
        }
    }
}

/// The first transaction was dropped, or has lost its connection, before it could sign.
impl Drop for Signer<'_> {
    fn drop(&mut self) {
        let mut signature = lock(&self.signatures.0);
        if matches!(&*signature, Some((signed, State::UnderWay)) if *signed == self.id) {
            *signature = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: GenerationId = GenerationId(1);
    const NEW: GenerationId = GenerationId(2);

    fn signature() -> Arc<Signature> {
        Arc::new(Signature(vec![(7, true)]))
    }

    fn is_done(signing: &SignatureState<'_>, by: Option<&Arc<Signature>>) -> bool {
        matches!(signing, SignatureState::Done(signature) if signature.as_ref() == by)
    }

    #[test]
    fn one_transaction_signs_for_all() {
        let signatures = SignatureCache::default();
        let SignatureState::Yours(signer) = signatures.of(NEW) else { panic!("nobody signs") };
        assert!(is_done(&signatures.of(NEW), None), "it is under way");
        signer.ended(Some(signature()));
        assert!(is_done(&signatures.of(NEW), Some(&signature())));
        assert!(is_done(&signatures.of(OLD), None), "the pool has left it");
    }

    /// A dropped future, or a lost connection.
    #[test]
    fn a_transaction_that_did_not_sign_leaves_it_to_the_next() {
        let signatures = SignatureCache::default();
        for _ in 0..3 {
            assert!(matches!(signatures.of(NEW), SignatureState::Yours { .. }), "nobody signs any more");
        }
        let SignatureState::Yours(signer) = signatures.of(NEW) else { panic!("nobody signs") };
        signer.ended(None);
        assert!(is_done(&signatures.of(NEW), None), "it is impossible, and not tried again");
    }

    #[test]
    fn who_signs_an_old_timeline_takes_nothing_from_the_new_one() {
        let signatures = SignatureCache::default();
        let old = signatures.of(OLD);
        let SignatureState::Yours(signer) = signatures.of(NEW) else { panic!("nobody signs") };
        drop(old);
        signer.ended(Some(signature()));
        assert!(is_done(&signatures.of(NEW), Some(&signature())));
    }
}
