//! The signature of a primary's timeline. The pool's first transaction on the primary makes it for all others.

use std::sync::{Arc, Mutex};

use crate::commit::Signature;
use crate::sync::lock;
use crate::topology::GenerationId;

/// The signature of the newest primary's timeline. The inner `None`: signing is under way, or it is impossible.
#[derive(Default)]
pub(crate) struct Signatures(Mutex<Option<(GenerationId, Option<Arc<Signature>>)>>);

/// The state of signing a primary's timeline.
pub(crate) enum Signing {
    /// The timeline has this signature, or none.
    Done(Option<Arc<Signature>>),
    Yours,
}

impl Signatures {
    /// Returns the signature of this primary's timeline. Only the first caller gets [`Signing::Yours`], and must sign
    /// the timeline.
    pub(crate) fn of(&self, id: GenerationId) -> Signing {
        let mut signature = lock(&self.0);
        match &*signature {
            Some((signed, by)) if *signed >= id => Signing::Done(by.clone().filter(|_| *signed == id)),
            _ => {
                *signature = Some((id, None));
                Signing::Yours
            }
        }
    }

    pub(crate) fn set(&self, id: GenerationId, by: Option<Arc<Signature>>) {
        let mut signature = lock(&self.0);
        if let Some((signed, held)) = &mut *signature
            && *signed == id
        {
            *held = by;
        }
    }
}
