//! The signature of a primary's timeline, which the first of a pool's transactions on the primary makes for all of them.

use std::sync::{Arc, Mutex};

use crate::commit::Signature;
use crate::sync::lock;
use crate::topology::GenerationId;

/// The signature of the newest primary's timeline. An inner `None`: signing is under way, or is impossible.
#[derive(Default)]
pub(crate) struct Signatures(Mutex<Option<(GenerationId, Option<Arc<Signature>>)>>);

/// The state of signing a primary's timeline.
pub(crate) enum Signing {
    /// The timeline is signed with this, or is not signed.
    Done(Option<Arc<Signature>>),
    Yours,
}

impl Signatures {
    /// Returns the signature of this primary's timeline, or the task of signing it, which only one caller gets.
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
